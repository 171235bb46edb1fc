"""The gradient of the nearest prototype where few classes are the nearest of many: who adds what, against float64."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers.kernel_problems import DEVICE
from helpers.memory import LargestTensor
from ltloss_kernels import nearest_prototype_gradient, prototype_search
from torch import Tensor

from ltloss import reference
from ltloss.functional import nearest_prototype
from ltloss.testing import problem, relative_error, watching

pytestmark = pytest.mark.slow

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
CHUNK = 8
CLASSES = 10  # few: the interpreter takes milliseconds for each

Pairs = tuple[Tensor, Tensor, Tensor]  # the gradient of each pair's cosine, and both ends


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prototype_search, "CHUNK", CHUNK)


def prototypes(width: int, dtype: torch.dtype = F32) -> Tensor:
    return problem(1, CLASSES, width).prototypes.to(DEVICE, dtype)


def hub_pairs(hubs: dict[int, int]) -> Pairs:
    """Pairs in which each hub stands so many times, in random order; the others stand there for about as many each."""
    near = torch.tensor([hub for hub, count in hubs.items() for _ in range(count)])
    others = torch.tensor([one for one in range(CLASSES) if one not in hubs])
    order = torch.randperm(len(near))
    own = others[torch.arange(len(near)) % len(others)]
    weight = torch.randn(2 * len(near))[::2]
    return weight.to(DEVICE), own[order].to(DEVICE), near[order].to(DEVICE)


def ours(given: Tensor, pairs: Pairs) -> Tensor:
    weight, own, near = pairs
    return nearest_prototype_gradient(weight, given, own, near)


def error(given: Tensor, pairs: Pairs) -> float:
    """Largest relative error of a class, against float64 on the same numbers."""
    weight, own, near = pairs
    leaf = given.double().requires_grad_()
    cosine = torch.nn.functional.cosine_similarity(leaf[own], leaf[near], dim=1)
    exact = torch.autograd.grad(cosine, leaf, weight.double())[0]
    found = ours(given, pairs)
    assert found.dtype == given.dtype
    errors = [relative_error(one, other) for one, other in zip(found, exact, strict=True) if bool(other.any())]
    return float(torch.tensor(errors).max())  # NaN, where one is


@pytest.mark.parametrize("count", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 5 * CHUNK + 3])
@pytest.mark.parametrize("width", [19, 520])  # a chunk in one step, and in four
def test_a_hub_at_the_edges_of_its_chunks(count: int, width: int) -> None:
    assert error(prototypes(width), hub_pairs({count % CLASSES: count})) <= 2e-6


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_several_hubs_side_by_side(dtype: torch.dtype) -> None:
    hubs = {0: 9, 4: 19, 5: CHUNK, 6: 2 * CHUNK, CLASSES - 1: 11}
    assert error(prototypes(130, dtype), hub_pairs(hubs)) <= 2e-6 + torch.finfo(dtype).eps


@pytest.mark.parametrize("subset", [False, True])
def test_a_hub_that_the_search_finds(subset: bool) -> None:
    given = 0.3 * torch.eye(CLASSES, CLASSES + 1, device=DEVICE)
    given[:, CLASSES] = 1.0
    given[7] = torch.tensor([0.0] * CLASSES + [1.0])
    rows = torch.cat([torch.arange(CLASSES), torch.full((20,), 3)]).to(DEVICE) if subset else None
    leaf, wide = given.clone().requires_grad_(), given.double().requires_grad_()
    found = nearest_prototype(leaf, rows)
    assert int((found.index == 7).sum()) == len(found.index) - 1
    weight = torch.linspace(-1, 1, len(found.index), device=DEVICE)
    mine = torch.autograd.grad(found.cosine, leaf, weight)[0]
    exact = torch.autograd.grad(reference.nearest_prototype(wide, rows).cosine, wide, weight.double())[0]
    assert relative_error(mine, exact) <= 1e-6


def test_the_bits_of_a_class_depend_on_its_own_pairs_alone() -> None:
    """Not on the place of its entries among those of the others."""
    given = prototypes(520)
    weight, own, near = hub_pairs({4: 27, 6: 9})
    expected = ours(given, (weight, own, near))
    assert torch.equal(expected, ours(given, (weight, own, near)))
    hubs = torch.tensor([4, 6], device=DEVICE)
    for more in (1, 3):
        added = torch.arange(more, device=DEVICE)
        pairs = torch.cat([weight, added + 1.0]), torch.cat([own, added]), torch.cat([near, added + 1])
        assert torch.equal(ours(given, pairs)[hubs], expected[hubs])


def test_a_class_with_less_than_two_chunks_is_added_up_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    given, pairs = prototypes(520), hub_pairs({4: 2 * CHUNK - 1, 5: CHUNK, 6: 19, 7: CHUNK - 1})
    chunked = ours(given, pairs)
    monkeypatch.setattr(prototype_search, "CHUNK", 1 << 20)
    differ = (chunked != ours(given, pairs)).any(1)
    assert differ.nonzero().flatten().tolist() in ([], [6])


def test_the_sums_of_chunks_take_a_row_for_each_chunk_at_most() -> None:
    given, pairs = prototypes(40), 160
    own = torch.arange(pairs, device=DEVICE) % 2
    with watching(LargestTensor()) as mode:
        nearest_prototype_gradient(torch.ones(pairs, device=DEVICE), given, own, 1 - own)
    in_bytes = 4 * given.shape[1] * 2 * pairs // CHUNK  # so the interpreter looks at memory
    assert mode.largest <= in_bytes < 4 * given.shape[1] * pairs


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How many blocks of rows each program of each kernel loads: one after the other, for each is added to a sum."""
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    counted: Counter[tuple[str, int]] = Counter()
    kernel, execute, load = "", GridExecutor.__call__, interpreter_builder.create_masked_load

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal kernel
        kernel = self.fn.__name__
        return execute(self, *args, **kwargs)

    def create_masked_load(pointers: Any, *rest: Any) -> Any:
        counted[kernel, interpreter_builder.grid_idx[0]] += pointers.data.ndim == 2
        return load(pointers, *rest)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setattr(interpreter_builder, "create_masked_load", create_masked_load)
    return counted


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the interpreter does")
class TestSteps:
    ENTRIES = 2  # of a step at this width
    WIDTH = 520

    def test_no_program_adds_up_a_hub(self, steps: Counter[tuple[str, int]]) -> None:
        """A chunk, or a partial sum for each chunk and less than a chunk, and the class' own row."""
        count = 20 * CHUNK
        ours(prototypes(self.WIDTH), hub_pairs({4: count}))
        assert steps["nearest_gradient_kernel", 4] == count // CHUNK // self.ENTRIES + 1
        assert max(steps.values()) == steps["nearest_gradient_kernel", 4]
        in_chunks = [number for (kernel, _), number in steps.items() if kernel == "chunk_sum_kernel"]
        assert max(in_chunks) == CHUNK // self.ENTRIES
        assert sum(in_chunks) * self.ENTRIES >= count

    def test_without_a_hub_there_are_no_partial_sums(self, steps: Counter[tuple[str, int]]) -> None:
        given, near = prototypes(self.WIDTH), (torch.arange(CLASSES, device=DEVICE) + 1) % CLASSES
        nearest_prototype_gradient(torch.ones(CLASSES, device=DEVICE), given, None, near)
        in_chunks = [number for (kernel, _), number in steps.items() if kernel == "chunk_sum_kernel"]
        assert len(in_chunks) == 2 * CLASSES // CHUNK
        assert not any(in_chunks)
        assert {steps["nearest_gradient_kernel", one] for one in range(CLASSES)} == {2}
