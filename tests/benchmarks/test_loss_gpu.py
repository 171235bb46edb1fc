"""The GPU benchmark, as far as it can be tried without a GPU: every section runs here on tiny shapes."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.refusals import missing, refused
from torch import Tensor

from benchmarks import peers
from benchmarks.loss_gpu import __main__ as gpu
from benchmarks.loss_gpu import correctness, kept, search, system, times, updates
from benchmarks.loss_gpu.measure import Deadline, Device, TooSlow
from benchmarks.nearest import shortfall
from benchmarks.peers import (
    ON_GPU,
    TOLERANCE,
    Inputs,
    Provider,
    Shape,
    check_step,
    dense_margin_loss,
    exact_step,
    margin_truth,
)
from ltloss import functional

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY = Shape(5, 33, 8)


@pytest.fixture(autouse=True)
def as_users_run_it(default_algorithms: None, sizes_for_a_cpu: None) -> None:
    """Peers use operators that have no deterministic variant."""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_deadline_shares_what_is_left() -> None:
    clock = Clock()
    deadline = Deadline(60.0, clock)
    clock.now += 20.0
    section = deadline.share(0.5)
    assert (deadline.left(), section.left()) == (40.0, 20.0)
    section.allow(20.0)
    with refused("21.0", "20.0", error=TooSlow):
        section.allow(21.0)
    clock.now += 50.0
    assert deadline.left() == -10.0
    assert deadline.share(0.5).left() == 0.0
    with refused("0.0", error=TooSlow):
        deadline.allow(0.0)


HANGS = """
import multiprocessing, sys, time
from pathlib import Path
from benchmarks.loss_gpu.measure import ends_within

worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
worker.start()
with ends_within(0.2, lambda: Path(sys.argv[1]).write_text(str(worker.pid))):
    time.sleep(600)
"""


def test_a_run_that_hangs_is_ended_after_writing_what_it_has(tmp_path: Path, ends: Callable[[int], bool]) -> None:
    start = time.monotonic()
    command = [sys.executable, "-c", HANGS, str(tmp_path / "rows")]
    done = subprocess.run(command, cwd=ROOT, timeout=100, check=False)
    assert done.returncode == 3
    assert time.monotonic() - start < 90
    worker = int((tmp_path / "rows").read_text())
    assert ends(worker), "the worker outlived the run"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_section_runs_on_tiny_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [
        name for one in ON_GPU if (name := one.name) not in ("torch.compile", "row blocks")
    ]  # takes half a minute
    command = ["--device", "cpu", "--minutes", "9", "--repeats", "3", "--output", str(tmp_path / "rows.csv")]
    assert gpu.main([*command, *(part for name in chosen for part in ("--provider", name))]) == 0
    shown = capsys.readouterr().out
    assert " 0 wrong, 0 less accurate than promised" in shown
    written = read(tmp_path / "rows.csv")
    rows = [row for row in written if not row["phase"] or row["phase"] in times.OPERATIONS]
    searches = [row for row in written if row not in rows]
    cases = [*updates.update_cases(small=True), *kept.kept_cases(small=True), *search.search_cases(small=True)]
    assert {(row["phase"], row["provider"]) for row in searches} == {(case.phase, case.provider) for case in cases}
    assert len(searches) == len(cases)
    assert all(row["median_ms"] for row in searches), [row["note"] for row in searches]
    assert {row["provider"] for row in rows} == set(chosen)
    shapes = {tuple(int(row[axis]) for axis in "NCD") for row in rows}
    assert shapes == {(one.n, one.c, one.d) for one in times.TINY}
    for row in rows:
        assert row["commit"]
        assert row["device"]
        assert row["torch"] == torch.__version__
        assert row["median_ms"] or row["note"]
    ours = [row for row in rows if row["provider"] == "ltloss"]
    assert [row["phase"] for row in ours] == ["forward", "backward", "step"] * 3
    assert ours[-3]["host_us"], "the launch-bound shape has the host's time"
    for row in ours:
        operations = {"forward": 2, "backward": 6, "step": 8}[row["phase"]]
        rate = operations * int(row["N"]) * int(row["C"]) * int(row["D"]) / float(row["median_ms"]) * 1e-9
        assert float(row["tflops"]) == pytest.approx(rate, rel=2e-2)
        assert float(row["min_ms"]) <= float(row["median_ms"]) <= float(row["max_ms"])
        assert int(row["repeats"]) == 3
        assert float(row["relative_error"]) < TOLERANCE[torch.bfloat16]


STEPS = [
    case
    for case in (*updates.update_cases(small=True), *kept.kept_cases(small=True), *search.search_cases(small=True))
    if "step" in case.phase
]


@pytest.mark.parametrize("case", STEPS, ids=lambda case: f"{case.phase}, {case.provider}, {case.note}")
def test_gradients_count_as_memory_of_the_step(case: search.SearchCase) -> None:
    """Memory is counted from its level before a step: gradients that a step left there would be left out."""
    step = case.build("cpu", case.shape, case.dtype)
    step()
    held = inspect.getclosurevars(step).nonlocals.values()
    leaves = [one for one in held if isinstance(one, Tensor)]
    leaves += [p for one in held if isinstance(one, torch.nn.Module) for p in one.parameters()]
    leaves += [t for one in held if isinstance(one, Inputs) for t in (one.features, one.prototypes)]
    assert any(leaf.requires_grad for leaf in leaves)
    assert all(leaf.grad is None for leaf in leaves)


def test_a_replayed_graph_has_no_figure_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory was taken when it was captured: counted at a replay it would be 0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    graphs = [case for case in updates.update_cases(small=False) if "CUDA graph" in case.note]
    assert graphs
    monkeypatch.setattr(Device, "peak_bytes", lambda self, steps: [1 << 20])
    bench = times.Bench(Device("cpu"), Deadline(100.0), None, repeats=1)
    for case in (graphs[0], STEPS[0]):
        small = case._replace(shape=Shape(5, 33, 8), build=lambda *_: lambda: None)
        times.time_search(bench, small, bench.deadline)
    assert [row["extra_mib"] for row in bench.rows] == ["", "1.0"]


def test_what_is_wrong_is_not_timed(
    few_comparisons: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = functional.margin_cross_entropy

    def wrong(features: Tensor, prototypes: Tensor, labels: Tensor, **options: object) -> Tensor:
        return right(features, prototypes, labels, **options) * 1.5  # type: ignore[arg-type]

    monkeypatch.setattr(functional, "margin_cross_entropy", wrong)
    only = ["--provider", "ltloss", "--provider", "dense"]
    assert gpu.main(["--device", "cpu", "--quick", "--minutes", "9", "--repeats", "1", *only]) == 1
    shown = capsys.readouterr().out
    assert "WRONG, loss" in shown
    steps = [line for line in shown.splitlines() if " of P" in line and ("forward" in line or "backward" in line)]
    assert steps, "the others are timed all the same"
    assert all(" dense " in line and "although it fails" in line for line in steps)


def bench(provider: Provider, seconds: float = 60.0) -> times.Bench:
    return times.Bench(Device("cpu"), Deadline(seconds), None, repeats=2, providers=[provider])


def failing(error: Exception) -> Provider:
    def build(inputs: Inputs) -> object:
        raise error

    return Provider("peer", build, margin_truth)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("No module named 'peer'"), "not importable: No module named 'peer'"),
        (torch.OutOfMemoryError("tried to allocate"), "out of memory"),
        (ValueError("two\nlines"), "ValueError: two lines"),
    ],
)
def test_a_peer_that_cannot_run_says_why(error: Exception, reason: str) -> None:
    state = bench(failing(error))
    times.time_shape(state, TINY, state.providers, 1.0)
    assert [row["note"] for row in state.rows] == [reason]
    assert not state.failed


def test_ours_must_run() -> None:
    state = bench(dataclasses.replace(failing(RuntimeError("no kernel")), name="ltloss"))
    times.time_shape(state, TINY, state.providers, 1.0)
    assert state.failed


def test_a_provider_that_computes_something_else_is_not_timed() -> None:
    def build(inputs: Inputs) -> object:
        return lambda: 2.0 * dense_margin_loss(inputs)

    state = bench(Provider("peer", build, margin_truth))  # type: ignore[arg-type]
    times.time_shape(state, TINY, state.providers, 1.0)
    assert "relative errors" in state.rows[0]["note"]
    assert len(state.rows) == 1


def test_after_the_deadline_nothing_is_started() -> None:
    state = bench(ON_GPU[0], seconds=0.0)
    times.time_shape(state, TINY, state.providers, 1.0)
    assert [row["note"][:8] for row in state.rows] == ["too slow"]
    assert not state.failed, "being out of time is no mistake"
    assert correctness.check_all("cpu", Deadline(0.0), quick=True).compared == 0
    todo = system.properties(Device("cpu"), quick=False)
    assert system.check_all(Device("cpu"), Deadline(0.0), todo, 2).left_out == len(todo) > 5


def test_memory_that_cannot_be_given_back_loses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An illegal access is reported by whatever comes after it, so also by the release."""

    def broken(self: Device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Device, "release", broken)
    found = system.check_all(Device("cpu"), Deadline(600.0), system.ANYWHERE, 0)
    assert len(found.wrong) == found.compared == len(system.ANYWHERE)
    state = bench(ON_GPU[0])
    times.time_shape(state, TINY, state.providers, 1.0)
    times.time_search(state, next(iter(search.search_cases(small=True))), Deadline(60.0))
    assert any(row.get("median_ms") for row in state.rows)
    assert sum("illegal memory access" in row["note"] for row in state.rows) >= 2
    assert state.failed


def test_inputs_that_cannot_be_had_are_noted_for_every_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inputs, "draw", lambda *args, **kwargs: torch.empty(1 << 60))
    state = bench(ON_GPU[0])
    times.time_shape(state, TINY, ON_GPU, 1.0)
    assert [row["provider"] for row in state.rows] == [one.name for one in ON_GPU]
    assert state.failed


def test_what_only_a_gpu_can_tell_is_written_before_anything_else_may_end_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def die(*args: object, **options: object) -> None:
        raise SystemExit(139)

    def differs(device: Device) -> str:
        return "differs"

    monkeypatch.setattr(system, "ANYWHERE", (differs,))
    monkeypatch.setattr(correctness, "check_all", die)
    command = ["--device", "cpu", "--quick", "--minutes", "9", "--output", str(tmp_path / "rows.csv")]
    with pytest.raises(SystemExit):
        gpu.main(command)
    written = (tmp_path / "rows.txt").read_text()
    assert "WRONG: differs: differs\nproperties: 1 checked, 0 left out for time, 1 wrong" in written


def test_what_only_a_gpu_can_tell_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device("cpu")
    device.is_cuda = True
    todo = system.properties(device, quick=False)
    assert tuple(todo[: len(system.ON_A_GPU)]) == system.ON_A_GPU
    assert tuple(todo[len(system.ON_A_GPU) :]) == system.ANYWHERE


def test_no_gpu_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", ["8192x131072", "0x2x3", "axbxc", ""])
def test_a_shape_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--shape", text])
    assert not missing(capsys.readouterr().err, "--shape", "NxCxD")
    assert gpu.parse(["--shape", "8x16x32"]).shape == [Shape(8, 16, 32)]


@pytest.mark.parametrize("rows", [1, 2, 5, 7])
def test_the_exact_step_does_not_depend_on_how_it_is_cut(rows: int) -> None:
    inputs = Inputs.draw(TINY)
    for part, whole in zip(exact_step(margin_truth, inputs, rows), exact_step(margin_truth, inputs), strict=True):
        torch.testing.assert_close(part, whole)


def test_the_dense_provider_is_the_reference_in_float32() -> None:
    inputs = Inputs.draw(TINY)
    assert check_step("dense", lambda: dense_margin_loss(inputs), inputs, exact_step(margin_truth, inputs)) < 1e-5


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_the_row_blocks_are_the_reference_in_float32(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs.draw(TINY)
    monkeypatch.setattr(peers, "_BLOCK_BYTES", rows * 4 * TINY.c)
    assert (
        check_step("blocks", peers.row_blocks(inputs, compiled=False), inputs, exact_step(margin_truth, inputs)) < 1e-5
    )


def test_a_search_that_finds_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.nearest_prototype

    def wrong(prototypes: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        cosine, index = right(prototypes, rows)
        return cosine, (index + 1) % prototypes.shape[0]

    monkeypatch.setattr(functional, "nearest_prototype", wrong)
    state = bench(ON_GPU[0])
    case = next(iter(search.search_cases(small=True)))
    times.time_search(state, case, Deadline(60.0))
    assert state.failed
    assert "off by" in state.rows[0]["note"]
    checked = system.check_all(Device("cpu"), Deadline(60.0), system.ANYWHERE, 0)
    assert list(checked.wrong) == ["nearest is right"]


@pytest.mark.parametrize("spoil", ["cosine", "index", "twice", "nan"])
def test_a_shortfall_is_seen(spoil: str) -> None:
    features, prototypes = torch.randn(6, 8), torch.randn(30, 8)
    cosine, index = (tensor.clone() for tensor in functional.top_k(features, prototypes, 3))
    assert shortfall((cosine, index), features, prototypes) < 1e-6
    if spoil == "cosine":
        cosine[2, 1] += 1e-3
    elif spoil == "index":
        index[3, 0] = (index[3].max() + 1) % 30
    elif spoil == "twice":
        cosine[4, 1], index[4, 1] = cosine[4, 0], index[4, 0]
    else:
        cosine[0, 0] = torch.nan
    assert not shortfall((cosine, index), features, prototypes) < 9e-4
