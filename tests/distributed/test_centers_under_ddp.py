"""Class centres are of the whole batch: not what DDP does to buffers, but what a parallel head does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import world
from helpers.refusals import refused
from torch import Tensor, nn

import ltloss
from ltloss.distributed import class_mesh, parallelize

pytestmark = pytest.mark.slow


class _Model(nn.Module):
    def __init__(self, head: Any) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(6, 6), head

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.backbone(features), labels)  # type: ignore[no-any-return]


def _inside(rank: int) -> int:
    head = ltloss.CosineSpaceLoss(8, 6)
    wrapped = nn.parallel.DistributedDataParallel(_Model(head))
    given = torch.randn(4, 6), torch.arange(4) + 4 * rank
    with refused("DistributedDataParallel", error=RuntimeError):
        wrapped(*given)
    counted = int(head.centers.counts.sum() + head.step)
    wrapped.eval()(*given)  # moves no centre
    torch.autograd.backward(nn.parallel.DistributedDataParallel(_Model(ltloss.ArcFaceLoss(8, 6)))(*given))
    return counted


def test_centres_inside_ddp_are_refused() -> None:
    assert world.run(_inside, 2) == [0, 0]


def _beside(rank: int) -> list[list[int]]:
    """As the error says: with the classes spread, and with all of them on each rank."""
    counts = []
    for data in (1, 2):
        head = parallelize(ltloss.CosineSpaceLoss(8, 6), class_mesh(data), averaged_backbone=True)
        backbone = nn.parallel.DistributedDataParallel(nn.Linear(6, 6))
        torch.autograd.backward(head(backbone(torch.randn(4, 6)), torch.arange(4) + 4 * rank))
        counts.append(head.centers.counts.full_tensor().tolist())  # type: ignore[operator]
    return counts


def test_beside_ddp_they_are_of_the_whole_batch() -> None:
    assert world.run(_beside, 2) == [[[1] * 8] * 2] * 2


def _alone(rank: int) -> int:
    head = ltloss.CosineSpaceLoss(8, 6)
    nn.parallel.DistributedDataParallel(_Model(head))(torch.randn(4, 6), torch.arange(4))
    return int(head.centers.counts.sum())


def test_ddp_of_one_rank_is_no_harm() -> None:
    assert world.run(_alone, 1) == [4]
