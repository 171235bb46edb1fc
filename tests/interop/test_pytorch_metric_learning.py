"""The ``W`` of pytorch-metric-learning's losses."""

from __future__ import annotations

import pytest
import torch
from helpers import world
from helpers.cases import DIM, whole
from helpers.refusals import refused

import ltloss
from ltloss.distributed import class_mesh, parallelize
from ltloss.interop import import_pytorch_metric_learning

CLASSES = 11


def test_a_loss_of_pytorch_metric_learning() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs, ours = losses.CosFaceLoss(5, 4, margin=0.3, scale=7), ltloss.CosFaceLoss(5, 4, margin=0.3, scale=7.0)
    import_pytorch_metric_learning(ours, theirs)
    features, labels = torch.randn(6, 4), torch.randint(5, (6,))
    assert torch.allclose(ours(features, labels), theirs(features, labels), rtol=1e-5)


def _imported(rank: int, weight: torch.Tensor) -> None:
    for given in (weight.t(), {"W": weight.t()}):
        head = parallelize(ltloss.ArcFaceLoss(CLASSES, DIM), class_mesh())
        import_pytorch_metric_learning(head, given)
        assert torch.equal(whole(head.weight), weight)
    several = torch.randn(CLASSES * 3, DIM, generator=torch.Generator().manual_seed(0))
    head = parallelize(ltloss.ArcFaceLoss(CLASSES, DIM, sub_centers=3), class_mesh())
    import_pytorch_metric_learning(head, several.t())
    assert torch.equal(whole(head.weight), several.view(CLASSES, 3, DIM))


def test_a_matrix() -> None:
    weight = torch.randn(CLASSES, DIM)
    _imported(0, weight)
    head = ltloss.ArcFaceLoss(CLASSES, DIM)
    with refused("(6, 11)", "(11, 6)"):
        import_pytorch_metric_learning(head, {"W": weight})
    with refused("(22, 6)", "(11, 3, 6)"):
        import_pytorch_metric_learning(ltloss.ArcFaceLoss(CLASSES, DIM, sub_centers=3), torch.randn(DIM, 22))
    for given, found in (({}, "none"), (torch.nn.Linear(2, 2), "none"), (torch.randn(DIM), f"({DIM},)")):
        with refused("loss", "W", f"got {found}"):
            import_pytorch_metric_learning(head, given)


@pytest.mark.slow
def test_a_matrix_for_a_sharded_head() -> None:
    world.run(_imported, 2, torch.randn(CLASSES, DIM))
