"""Every module keeps the laws of ``ltloss.testing.check_loss``, and a loss that breaks one is caught."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ltloss import ArcFaceLoss
from ltloss.testing import MODULES, NOT_A_DERIVATIVE, check_loss


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", [name for name in MODULES if name not in NOT_A_DERIVATIVE])
def test_modules(name: str) -> None:
    check_loss(MODULES[name])


class _OfAnotherValue(torch.autograd.Function):
    """The loss as it is, with twice its gradient."""

    @staticmethod
    def forward(ctx: object, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return 2.0 * grads[0]


class _WrongGradient(ArcFaceLoss):
    def forward(self, features: Tensor, labels: Tensor, **options: object) -> Tensor:
        value: Tensor = _OfAnotherValue.apply(super().forward(features, labels))  # type: ignore[no-untyped-call]
        return value


class _CountsIgnoredRows(ArcFaceLoss):
    def forward(self, features: Tensor, labels: Tensor, **options: object) -> Tensor:
        return super().forward(features, labels) + 0.1 * torch.nan_to_num(features).square().mean()


class _ZeroTimesNaN(ArcFaceLoss):
    def forward(self, features: Tensor, labels: Tensor, **options: object) -> Tensor:
        counted = (labels != self.ignore_index).to(features.dtype)
        return super().forward(features, labels) + (counted * features.sum(1)).mean()


class _Draws(ArcFaceLoss):
    def forward(self, features: Tensor, labels: Tensor, **options: object) -> Tensor:
        noise = 0.1 * torch.randn(()) if self.training else 0.0
        return super().forward(features, labels) * (1.0 + noise)


class _RoundsTheLoss(ArcFaceLoss):
    def forward(self, features: Tensor, labels: Tensor, **options: object) -> Tensor:
        loss = super().forward(features, labels)
        return loss + 1.0 if features.dtype == torch.bfloat16 else loss


class _MeanOfNothing(ArcFaceLoss):
    def forward(self, features: Tensor, labels: Tensor, **options: object) -> Tensor:
        return super().forward(features, labels) + 0.0 * labels.to(features.dtype).mean()


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (_WrongGradient, "_derivative"),
        (_CountsIgnoredRows, "_ignored_rows"),
        (_ZeroTimesNaN, "_ignored_rows"),
        (_Draws, "_repeated"),
        (_RoundsTheLoss, "_half_precision"),
        (_MeanOfNothing, "_empty_batch"),
    ],
)
def test_a_broken_loss_is_caught_by_its_law(broken: Callable[..., ArcFaceLoss], law: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_loss(lambda classes, size: broken(classes, size, scale=8.0))
    assert law in [entry.name for entry in caught.traceback]
