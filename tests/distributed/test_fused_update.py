"""Spread over ranks, the update inside the backward moves each shard as one process moves the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import world
from helpers.cases import DIM, Case, batch, build, part, whole
from helpers.refusals import refused
from torch import Tensor

import ltloss
from ltloss.distributed import class_mesh, parallelize
from ltloss.float8 import FLOAT8
from ltloss.optim import PrototypeAdagrad, PrototypeAdamW, PrototypeSGD
from ltloss.testing import relative_error

pytestmark = pytest.mark.slow

SIZES = ((5, 3, 4, 2), (4, 4, 0, 4), (6, 1, 3, 2), (7, 2, 2, 1))
LOSSES = ("ArcFaceLoss", "CosineSpaceLoss", "family everything", "family per_sample")
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda m, **o: PrototypeSGD(m, lr=0.1, momentum=0.9, weight_decay=0.01, **o),
    "AdamW": lambda m, **o: PrototypeAdamW(m, lr=0.01, max_class_norm=0.5, **o),
    "Adagrad": lambda m, **o: PrototypeAdagrad(m, lr=0.1, **o),
}


def _train(case: Case, name: str, rank: int | None = None, data: int = 1, **options: Any) -> list[Tensor]:
    """Prototypes and state after four steps, in one piece."""
    module = build(case)
    if rank is not None:
        module = parallelize(module, class_mesh(data))
    optimizer = OPTIMIZERS[name](module, **options)
    for step in range(len(case.sizes)):
        features, labels = batch(case, step)
        upstream = torch.linspace(-1.0, 2.0, features.shape[0], dtype=features.dtype)
        rows = slice(None) if rank is None else part(case, step, rank)
        loss = module(features[rows].requires_grad_(), labels[rows])
        torch.autograd.backward((loss * upstream[rows]).sum() if loss.dim() else loss)
        optimizer.step()
    state = optimizer.state[module.weight]
    return [whole(tensor) for tensor in (module.weight, *state.values()) if tensor.dim()]


def _cases(ranks: int) -> list[tuple[Case, str]]:
    sizes = tuple(size[:ranks] for size in SIZES)
    return [(Case(loss, 11, sizes, torch.float64), name) for loss in LOSSES for name in OPTIMIZERS]


def _all(rank: int, ranks: int, meshes: tuple[int, ...]) -> list[list[list[Tensor]]]:
    return [[_train(*case, rank, data) for case in _cases(ranks)] for data in meshes]


@pytest.mark.parametrize(("ranks", "meshes"), [(2, (1, 2)), (4, (1, 2))])
def test_equals_one_process(ranks: int, meshes: tuple[int, ...]) -> None:
    found = world.run(_all, ranks, ranks, meshes)
    with world.one_thread():
        expected = [_train(*case) for case in _cases(ranks)]
    for place in range(len(meshes)):
        for number, (case, name) in enumerate(_cases(ranks)):
            for rank in found:
                for one, other in zip(rank[place][number], expected[number], strict=True):
                    assert relative_error(one, other) <= 1e-9, (case.loss, name)


def _rounded(rank: int | None, ranks: int, dtype: torch.dtype) -> list[Tensor]:
    case = Case("ArcFaceLoss", 11, tuple(size[:ranks] for size in SIZES[:1]), dtype)
    return _train(case, "SGD", rank, rounding="stochastic", seed=3, state_dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8])
def test_random_bits_belong_to_classes_and_not_to_ranks(dtype: torch.dtype) -> None:
    """Gradients differ in their last bits, so at most a few entries fall on the other side of their random number."""
    found = world.run(_rounded, 3, 3, dtype)
    with world.one_thread():
        expected = _rounded(None, 3, dtype)
    for rank in found:
        for one, other in zip(rank, expected, strict=True):
            assert int((one != other).sum()) <= 0.05 * one.numel()


def _refusals(rank: int) -> None:
    module = parallelize(ltloss.LongTailLoss.from_counts([3] * 6, DIM), class_mesh())
    PrototypeSGD(module)
    with refused("PrototypeSGD", "min_angle_weight"):
        module(torch.randn(2, DIM), torch.tensor([1, 2]))
    late = ltloss.CosFaceLoss(6, DIM)
    PrototypeSGD(late)
    late = parallelize(late, class_mesh())
    with refused("PrototypeSGD", "parallelize"):
        late(torch.randn(2, DIM), torch.tensor([1, 2]))
    alone = ltloss.CosFaceLoss(6, DIM)
    PrototypeSGD(alone)
    copied = torch.nn.parallel.DistributedDataParallel(alone)
    with refused("PrototypeSGD", "DistributedDataParallel", "parallelize", error=RuntimeError):
        copied(torch.randn(2, DIM), torch.tensor([1, 2]))


def test_what_would_part_the_ranks_is_refused() -> None:
    world.run(_refusals, 2)
