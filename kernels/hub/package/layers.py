"""Layers for ``kernels.kernelize``: they have a ``forward`` only, and use the state of the module they replace."""

from __future__ import annotations

from torch import Tensor, nn

from ltloss.functional import margin_cross_entropy

__all__ = ["AMSoftmaxLoss", "CombinedMarginLoss"]


class CombinedMarginLoss(nn.Module):
    """Mean cross-entropy of s·(cos(θ_y + m2) − m3) for the target class and s·cos θ_c for the others.

    The replaced module must have ``weight`` (C, D), ``scale`` s, and the margins ``angular_margin`` m2 in radians and
    ``cosine_margin`` m3, each a number or (C,). ArcFace has m3 = 0, CosFace m2 = 0.

    Source: Deng et al., ArcFace, CVPR 2019, eq. 4.
    """

    weight: Tensor
    scale: float
    angular_margin: Tensor | float
    cosine_margin: Tensor | float

    can_torch_compile = True

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar, of features (N, D) with labels (N,)."""
        return margin_cross_entropy(
            features,
            self.weight,
            labels,
            scale=self.scale,
            angular_margin=self.angular_margin,
            cosine_margin=self.cosine_margin,
        )


class AMSoftmaxLoss(nn.Module):
    """Mean cross-entropy of s·(cos θ_y − m) for the target class and s·cos θ_c for the others.

    It replaces ``AMSoftmaxLoss`` of the x-vector heads of transformers, which has ``weight`` (D, C), ``scale`` s and
    ``margin`` m.

    Source: Wang et al., Additive margin softmax, 2018.
    """

    weight: Tensor
    scale: float
    margin: float

    can_torch_compile = True

    def forward(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar, of hidden states (N, D) with labels of N elements."""
        return margin_cross_entropy(
            hidden_states, self.weight.t(), labels.flatten(), scale=self.scale, cosine_margin=self.margin
        )
