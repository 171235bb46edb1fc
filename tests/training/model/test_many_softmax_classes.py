"""The softmax baseline with many classes: without the N×C logits, and the same loss, gradients and classes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ltloss.training.model import softmax_loss
from ltloss.training.model.softmax_loss import SoftmaxLoss

COUNTS = [50, 20, 9, 4, 2, 1]


def _step(loss: SoftmaxLoss, features: Tensor, labels: Tensor) -> list[Tensor]:
    leaf = features.clone().requires_grad_()
    loss.zero_grad()
    value = loss(leaf, labels)
    value.backward()
    return [value.detach(), leaf.grad, *(one.grad.clone() for one in loss.parameters())]


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize(("smoothing", "weighted"), [(0.0, False), (0.1, False), (0.0, True), (0.1, True)])
def test_many_classes_have_the_loss_of_few(
    tau: float, smoothing: float, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    loss = SoftmaxLoss.from_counts(COUNTS, 5, tau=tau, label_smoothing=smoothing).double()
    loss.set_class_weight(torch.linspace(0.5, 2.0, 6, dtype=torch.float64) if weighted else None)
    features, labels = torch.randn(7, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 5, 0])
    few, best = _step(loss, features, labels), loss.predict(features, 3)
    monkeypatch.setattr(softmax_loss, "_MANY", 6)
    torch.testing.assert_close(_step(loss, features, labels), few)
    found = loss.predict(features, 3)
    assert torch.equal(found.index, best.index)
    torch.testing.assert_close(found.cosine.float(), best.cosine)
