"""Two data groups of two class ranks with a sample of the classes: one process, to the last digits of float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import world
from helpers.cases import DIM
from torch import Tensor

import ltloss
from ltloss import functional as F
from ltloss.distributed import class_mesh, parallelize
from ltloss.distributed.layout import Layout
from ltloss.testing import problem, relative_error

CLASSES, RANKS, ROWS = 23, 4, 3
SEED = 5

pytestmark = pytest.mark.slow

MODULES: dict[str, Any] = {
    "combined": lambda: ltloss.CombinedMarginLoss(CLASSES, DIM, angular_margin=0.3, cosine_margin=0.2, scale=8.0),
    "cosine-space": lambda: ltloss.CosineSpaceLoss(CLASSES, DIM, scale=8.0, epsilon=0.0),
}


def _built(name: str) -> ltloss.PrototypeHead:
    module: ltloss.PrototypeHead = MODULES[name]().double()
    with torch.no_grad():
        module.weight.copy_(problem(1, CLASSES, DIM, dtype=torch.float64, seed=7)[1])
    return module


def _batch() -> tuple[Tensor, Tensor]:
    features, _, labels = problem(RANKS * ROWS, CLASSES, DIM, dtype=torch.float64, seed=3)
    return features.requires_grad_(), labels


Step = tuple[Tensor, Tensor, Tensor]


def _on_ranks(rank: int, rate: float) -> list[Step]:
    """Loss, gradient of the rows of this rank and of all prototypes."""
    found = []
    for name in MODULES:
        module = parallelize(_built(name), class_mesh(data=2), sample_rate=rate, sample_seed=SEED)
        features, labels = _batch()
        mine = slice(rank * ROWS, (rank + 1) * ROWS)
        loss = module(features[mine], labels[mine])
        loss.backward()
        found.append((loss.detach(), features.grad[mine], module.weight.grad.full_tensor()))  # type: ignore[index, union-attr]
    return found


def _drawn(rank: int, rate: float) -> tuple[Tensor, Tensor]:
    """The classes that this rank draws for the batch, and what is added to their logits; of the first data group."""
    module = parallelize(_built("combined"), class_mesh(data=2), sample_rate=rate, sample_seed=SEED)
    layout: Layout = module.layout
    shard = module.sampler.draw(_batch()[1], module.weight, layout)
    return shard.index + layout.span()[0], shard.correction


def _compare(ranks: list[list[Step]], place: int, loss: Tensor, features: Tensor, prototypes: Tensor) -> None:
    for rank in ranks:
        assert relative_error(rank[place][0], loss) <= 1e-13
        assert relative_error(rank[place][2], prototypes, 1e-3) <= 1e-12
    assert relative_error(torch.cat([rank[place][1] for rank in ranks]), features, 1e-3) <= 1e-12


def test_a_sample_of_all_classes_is_one_process() -> None:
    """0.99 of the eleven or twelve classes of a rank, rounded up, are all of them, taken the way of a sample."""
    ranks = world.run(_on_ranks, RANKS, 0.99)
    for place, name in enumerate(MODULES):
        module, (features, labels) = _built(name), _batch()
        loss = module(features, labels)
        gradients = torch.autograd.grad(loss, (features, module.weight))
        _compare(ranks, place, loss.detach(), *gradients)


def test_a_sample_is_the_reference_on_its_classes() -> None:
    drawn = world.run(_drawn, RANKS, 0.8)
    for column in (0, 1):
        assert all(torch.equal(drawn[rank][column], drawn[rank + 2][column]) for rank in (0, 1))
    prior = torch.full((CLASSES,), -torch.inf, dtype=torch.float64)
    for classes, correction in drawn[:2]:
        prior[classes] = correction
    module, (features, labels) = _built("combined"), _batch()
    with ltloss.use_backend("reference"):
        loss = F.margin_cross_entropy(
            features, module.weight, labels, scale=8.0, angular_margin=0.3, cosine_margin=0.2, log_prior=prior
        )
    gradients = torch.autograd.grad(loss, (features, module.weight))
    assert {0.0, -torch.inf} < set(prior.tolist())  # of the batch, left out, and drawn
    _compare(world.run(_on_ranks, RANKS, 0.8), 0, loss.detach(), *gradients)
