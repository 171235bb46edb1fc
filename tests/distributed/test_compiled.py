"""torch.compile of parallel modules gives the numbers of eager mode; with a capacity it is one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import world
from helpers.cases import DIM
from torch import Tensor

import ltloss
from ltloss.distributed import class_mesh, parallelize
from ltloss.distributed.layout import local
from ltloss.testing import problem

pytestmark = pytest.mark.slow

CLASSES, ROWS = 11, 4
MODULES: dict[str, Any] = {
    "ArcFaceLoss": lambda: ltloss.ArcFaceLoss(CLASSES, DIM),
    "CosineSpaceLoss": lambda: ltloss.CosineSpaceLoss(CLASSES, DIM, label_smoothing=0.1),
}


def _steps(rank: int, name: str, data: int, capacity: int | None, compiled: bool) -> list[Tensor]:
    """Three steps: losses and gradients, then this rank's weight and buffers."""
    torch.manual_seed(0)
    module = parallelize(MODULES[name](), class_mesh(data), capacity=capacity)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    run, seen = module, []
    for step in range(3):
        features, _, labels = problem(ROWS, CLASSES, DIM, dtype=torch.float32, seed=10 * step + rank)
        leaf = features.requires_grad_()
        optimizer.zero_grad()
        loss = run(leaf, labels)
        loss.backward()
        optimizer.step()
        seen += [loss.detach(), leaf.grad]
        if compiled and step == 0:  # after a step in which the ranks have agreed on what a message looks like
            run = torch.compile(module, fullgraph=capacity is not None, backend="aot_eager")
    return [*seen, *(local(tensor).clone() for tensor in module.state_dict().values())]


def _both(rank: int, data: int, capacity: int | None) -> list[tuple[list[Tensor], list[Tensor]]]:
    torch.compiler.reset()
    both = (False, True)
    return [tuple(_steps(rank, name, data, capacity, compiled) for compiled in both) for name in MODULES]  # type: ignore[misc]


@pytest.mark.parametrize(("ranks", "data", "capacity"), [(2, 1, None), (1, 1, ROWS), (2, 1, ROWS), (2, 2, ROWS)])
def test_as_in_eager_mode(ranks: int, data: int, capacity: int | None) -> None:
    for found in world.run(_both, ranks, data, capacity):
        for eager, compiled in found:
            torch.testing.assert_close(compiled, eager)
