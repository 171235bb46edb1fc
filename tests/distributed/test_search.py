"""predict and the nearest prototype over shards: exact, ties included, and no more memory than the blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import world
from cases import DIM, whole
from losses import relative_error
from memory import LargestTensor
from torch import Tensor

from ltloss import functional
from ltloss.distributed import class_mesh
from ltloss.distributed.layout import Layout, local
from ltloss.distributed.nearest import _round


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
    return layout.place(prototypes[start:stop].clone(), prototypes.shape[1]).requires_grad_(), layout


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
    angles = [functional.min_angle_regularizer(weight, given, rows=rows) for given in (counts, None)]
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


def _nearest_on(rank: int, data: int) -> list[Nearest]:
    return _nearest(data)


def _check_nearest(ranks: int, data: int) -> None:
    expected = _nearest(None)
    for found in world.run(_nearest_on, ranks, data):
        for one, exact in zip(found, expected, strict=True):
            assert torch.equal(one.index, exact.index)
            assert relative_error(one.cosine, exact.cosine) <= 1e-6
            if exact.cosine.dtype == torch.float64:  # float32 does not resolve the angle between equal prototypes
                assert relative_error(one.angles, exact.angles) <= 1e-7
                assert relative_error(one.grad, exact.grad, 1e-2) <= 1e-7


def test_nearest_prototype_on_three_ranks() -> None:
    _check_nearest(3, 1)


def test_nearest_prototype_on_four_ranks_and_two_by_two() -> None:
    _check_nearest(4, 1)
    _check_nearest(4, 2)


def _memory(rank: int, classes: int, width: int) -> int:
    weight, layout = _sharded(_prototypes(classes, 0, False, width))
    own = local(weight)
    with LargestTensor() as mode:
        _round(own, layout)
    return mode.largest


def test_no_tensor_is_larger_than_a_block_or_a_tile() -> None:
    classes, width = 40_000, 32
    for largest in world.run(_memory, 4, classes, width):
        assert largest <= max(classes // 4 * width, 1 << 20)  # elements; the tile of cosines holds a million


def _top_k(rank: int, data: int) -> list[Any]:
    found = []
    for seed, (classes, copies) in enumerate(PROBLEMS):
        weight, layout = _sharded(_prototypes(classes, seed, copies), data)
        queries = _prototypes(20, seed + 100, False)
        near = _prototypes(classes, seed, copies)[torch.arange(20) % classes] + 0.2 * queries
        mine = torch.arange(20) % layout.ranks == rank
        found += [(mine, functional.top_k(near[mine], weight, k)) for k in {1, min(4, classes), classes}]
    return found


def test_top_k_of_copies_on_several_ranks() -> None:
    for ranks, data in ((3, 1), (4, 2)):
        expected = []
        for seed, (classes, copies) in enumerate(PROBLEMS):
            prototypes, queries = _prototypes(classes, seed, copies), _prototypes(20, seed + 100, False)
            near = prototypes[torch.arange(20) % classes] + 0.2 * queries
            expected += [functional.top_k(near, prototypes, k) for k in {1, min(4, classes), classes}]
        for found in world.run(_top_k, ranks, data):
            for (mine, (cosine, index)), exact in zip(found, expected, strict=True):
                assert torch.equal(index, exact.index[mine])
                assert relative_error(cosine, exact.cosine[mine]) <= 1e-5
