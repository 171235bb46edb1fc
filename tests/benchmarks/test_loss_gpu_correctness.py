"""What the GPU benchmark compares: cases against float64, and properties that only a GPU can break."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.refusals import missing
from torch import Tensor

from benchmarks.loss_gpu import correctness, system
from benchmarks.loss_gpu.measure import Deadline, Device
from benchmarks.peers import Inputs
from ltloss import reference
from ltloss.testing import Problem

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def as_users_run_it(default_algorithms: None, sizes_for_a_cpu: None) -> None:
    """Plain PyTorch uses operators that have no deterministic variant."""


def test_a_verdict_takes_nan_for_wrong() -> None:
    verdict = correctness.Verdict("case", (float("nan"), 0.0, 0.0), (1.0, 1.0, 1.0))
    assert verdict.worst > correctness.WRONG
    assert correctness.Verdict("case", (0.5, 3.0, 0.0), (1.0, 2.0, 1.0)).worst == 1.5


def test_several_processes_compare_what_one_does(few_comparisons: None) -> None:
    one = correctness.check_all("cpu", Deadline(600.0), quick=True)
    two = correctness.check_all("cpu", Deadline(600.0), quick=True, processes=2)
    assert one.left_out == 0
    assert (two.compared, two.left_out, two.wrong, two.inaccurate) == (one.compared, 0, [], [])
    assert two.worst == pytest.approx(one.worst, rel=1e-3)


def test_the_product_runs_in_half_precision_only_where_both_allow_it() -> None:
    bf16, fp16, fp32, fp8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
    for dtypes, product in (
        ((bf16, bf16), bf16),
        ((bf16, fp32), bf16),
        ((fp16, fp16), fp16),
        ((fp32, bf16), fp32),
        ((bf16, fp16), fp32),
        ((fp32, fp32), fp32),
        ((bf16, fp8), bf16),
        ((fp32, fp8), fp32),
    ):
        assert correctness.product_dtype(dtypes) == product


def spoilt(ours: Callable[..., Tensor], *given: Tensor, **options: Any) -> Tensor:
    """A loss with a wrong value; or, if a vector learns, with a wrong gradient of that vector alone."""
    learned = {name: v for name, v in options.items() if isinstance(v, Tensor) and v.requires_grad}
    twice = {name: 2.0 * v - v.detach() for name, v in learned.items()}
    return ours(*given, **{**options, **twice}) * (1.0 if learned else 1.05)


@pytest.mark.parametrize("case", [*correctness._extensions(quick=True)], ids=lambda case: case.name)
def test_extensions_are_compared(case: correctness.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """All results, those of vectors that learn too: each right, and seen if it is wrong."""
    assert correctness.compare(case, "cpu").worst <= 1.0
    ours, dense = correctness._losses(case.loss)
    monkeypatch.setattr(correctness, "_losses", lambda name: (functools.partial(spoilt, ours), dense))
    found = correctness.compare(case, "cpu")
    assert found.worst > correctness.WRONG
    assert not missing(found.problem(), "WRONG", *found.names)
    learned = {name for name, v in case.options.items() if isinstance(v, Tensor) and v.requires_grad}
    assert set(found.names) == {"loss", "features", "prototypes", *learned}


def test_errors_that_plain_pytorch_has_in_samples_count_where_they_cancel_in_its_mean() -> None:
    """Else ours, as accurate in each sample, would be less accurate than promised."""
    given = Problem(torch.randn(50, 8), torch.randn(9, 8), torch.randint(9, (50,)))
    noise = torch.randn(50)
    noise -= noise.mean()

    def plain(*given: Tensor, reduction: str = "mean") -> Tensor:
        losses = reference.margin_cross_entropy(*given, reduction="none") * (1.0 + 1e-2 * noise)
        return losses if reduction == "none" else losses.mean()

    luck = correctness._luck(plain, reference.margin_cross_entropy, given, {})
    assert 1e-3 < luck < 1e-2
    assert correctness._luck(reference.margin_cross_entropy, reference.margin_cross_entropy, given, {}) < 1e-6


def test_a_graph_is_compared_with_the_steps_that_it_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU a graph is the list of its steps, and a replay runs them again into the same memory."""
    recorded: list[tuple[Callable[..., tuple[Tensor, ...]], Inputs, tuple[Tensor, ...]]] = []
    spoil = False

    def remembering(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        def run(inputs: Inputs) -> tuple[Tensor, ...]:
            found = tuple(one.clone() for one in function(inputs))
            recorded.append((function, inputs, found))
            return found

        return run

    def replay() -> None:
        for function, inputs, found in recorded[-2:]:
            for one, other in zip(found, function(inputs), strict=True):
                one.copy_(other + spoil)

    @contextlib.contextmanager
    def nothing(*given: object) -> Iterator[None]:
        yield

    for name in ("_step", "_searches"):
        monkeypatch.setattr(system, name, remembering(getattr(system, name)))
    for name, stub in {"Stream": mock.MagicMock(), "current_stream": mock.MagicMock(), "stream": nothing}.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch.cuda, "graph", nothing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=replay))
    for captured in (system.cuda_graph, system.cuda_graph_of_slabs):
        spoil = False
        assert captured(Device("cpu")) == ""
        spoil = True
        assert captured(Device("cpu"))


def test_every_case_of_the_comparison_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "problem", functools.cache(correctness.problem))
    names = [(case.name, case.dtypes) for case in correctness.cases(quick=False)]
    assert len(names) == len(set(names)) > 200
