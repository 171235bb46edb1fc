"""predict and the nearest prototype over shards: exact, ties included, and no more memory than the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers import world
from helpers.cases import DIM, whole
from helpers.memory import LargestTensor
from torch import Tensor

from ltloss import TopK, functional
from ltloss.distributed import class_mesh
from ltloss.distributed.layout import Layout
from ltloss.distributed.nearest import nearest_prototype
from ltloss.float8 import FLOAT8
from ltloss.testing import relative_error, watching

pytestmark = pytest.mark.slow


def _prototypes(classes: int, seed: int, copies: bool, width: int = DIM, dtype: torch.dtype = torch.float32) -> Tensor:
    """Prototypes (C, D), in which, if asked for, many are exact copies of others far away."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(classes, width, generator=generator, dtype=dtype)
    if copies:
        source = torch.randint(classes, (classes,), generator=generator)
        copied = torch.rand(classes, generator=generator) < 0.5
        prototypes = torch.where(copied[:, None], prototypes[source], prototypes)
    return prototypes


def _sharded(prototypes: Tensor, data: int = 1) -> tuple[Tensor, Layout]:
    mesh = class_mesh(data)
    layout = Layout(mesh, prototypes.shape[0], torch.device("cpu"))
    start, stop = layout.span()
    return layout.place(prototypes[start:stop].clone()).requires_grad_(), layout


LARGE = (24_000, 64)
PROBLEMS = [(1, False), (2, True), (3, False), (5, True), (17, True), (40, False), (300, True)]


def _rows(classes: int) -> Tensor:
    return torch.arange(0, classes, 3).flip(0)


class Nearest(NamedTuple):
    cosine: Tensor
    index: Tensor
    angles: Tensor
    grad: Tensor


def _search(weight: Tensor, rows: Tensor | None) -> Nearest:
    cosine, index = functional.nearest_prototype(weight, rows)
    counts = torch.arange(1, weight.shape[0] + 1)
    angles = [functional.min_angle_regularizer(weight, given, classes=rows) for given in (counts, None)]
    torch.autograd.backward(angles[0] + 3 * angles[1])
    assert weight.grad is not None
    return Nearest(whole(cosine), whole(index), torch.stack(angles).detach(), whole(weight.grad))


def _nearest(data: int | None) -> list[Nearest]:
    """On the ranks, or without ``data`` in one process."""
    found = []
    for seed, (classes, copies) in enumerate(PROBLEMS):
        for dtype in (torch.float32, torch.float64):
            for rows in (None, _rows(classes)):
                weight = _prototypes(classes, seed, copies, dtype=dtype)
                found.append(_search(weight.requires_grad_() if data is None else _sharded(weight, data)[0], rows))
    return found


def _top_k(weight_of: Callable[[Tensor], Tensor], mine: Tensor) -> list[TopK]:
    """The queries of one rank, each near a class, several of which are copies."""
    found = []
    for seed, (classes, copies) in enumerate(PROBLEMS):
        prototypes, noise = _prototypes(classes, seed, copies), _prototypes(20, seed + 100, False)
        near = prototypes[torch.arange(20) % classes] + 0.2 * noise
        ks = {1, min(4, classes), classes}
        found += [functional.top_k(near[mine], weight_of(prototypes), k) for k in sorted(ks)]
    return found


def _largest_tensor(classes: int, width: int) -> int:
    weight, _ = _sharded(_prototypes(classes, 0, False, width))
    with torch.no_grad(), watching(LargestTensor()) as mode:
        nearest_prototype(weight, None, False)
    return mode.largest


class Found(NamedTuple):
    nearest: list[Nearest]
    mine: Tensor
    top_k: list[TopK]


def _all(rank: int, ranks: int, data: int, autocast: bool = False) -> Found:
    mine = torch.arange(20) % ranks == rank
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return Found(_nearest(data), mine, _top_k(lambda prototypes: _sharded(prototypes, data)[0], mine))


def _on_four(rank: int) -> tuple[Found, Found, int]:
    return _all(rank, 4, 1), _all(rank, 4, 2), _largest_tensor(*LARGE)


def _check(ranks: list[Found]) -> None:
    expected, best = _nearest(None), _top_k(lambda prototypes: prototypes, torch.ones(20, dtype=torch.bool))
    for found in ranks:
        for number, (one, exact) in enumerate(zip(found.nearest, expected, strict=True)):
            assert torch.equal(one.index, exact.index)
            assert relative_error(one.cosine, exact.cosine) <= 1e-6
            wide, (_, copies) = exact.cosine.dtype == torch.float64, PROBLEMS[number // 4]
            if wide or not copies:  # float32 does not resolve the angle between equal prototypes
                assert relative_error(one.angles, exact.angles) <= (1e-7 if wide else 1e-6)
                assert relative_error(one.grad, exact.grad, 1e-2) <= (1e-7 if wide else 1e-5)
        for chosen, all_chosen in zip(found.top_k, best, strict=True):
            assert torch.equal(chosen.index, all_chosen.index[found.mine])
            assert relative_error(chosen.cosine, all_chosen.cosine[found.mine]) <= 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_search_on_three_ranks(autocast: bool) -> None:
    _check(world.run(_all, 3, 3, 1, autocast))


def test_search_on_four_ranks_and_two_by_two_in_bounded_memory() -> None:
    found = world.run(_on_four, 4)
    _check([rank[0] for rank in found])
    _check([rank[1] for rank in found])
    classes, width = LARGE
    for _, _, largest in found:
        assert largest <= max(classes // 4 * width, 1 << 20)  # elements; the tile of cosines holds a million


def _in_float8(rank: int | None) -> list[Tensor]:
    found = []
    for seed, (classes, copies) in enumerate(PROBLEMS):
        prototypes = _prototypes(classes, seed, copies).to(FLOAT8)
        weight = prototypes if rank is None else _sharded(prototypes)[0].detach()
        queries = _prototypes(20, seed + 100, False)
        found.append(whole(functional.nearest_prototype(weight).index))
        found += functional.nearest_prototype(weight, _rows(classes))
        found.append(functional.top_k(queries, weight, min(4, classes)).index)
    return found


def test_prototypes_in_float8_on_three_ranks() -> None:
    expected = _in_float8(None)
    for found in world.run(_in_float8, 3):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0.0)
