"""Losses that change the logits of other classes too, by how near they are to the sample."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltloss._validation import check_number
from ltloss.extend import Bend
from ltloss.losses.margin_losses import PriorOptions
from ltloss.losses.sample_margins import SampleMarginLoss
from ltloss.margins import Margin

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["CurricularFaceLoss", "InterclassFilterLoss"]


class CurricularFaceLoss(SampleMarginLoss):
    """ArcFace whose hard classes count more as training goes on: those with cos θ_c > cos(θ_y + m).

    Their logit is s·cos θ_c·(t + cos θ_c), with t the running mean of the target cosines.

    Args:
        num_classes: C.
        embedding_size: D.
        margin: m in radians.
        momentum: of the mean, which begins at 0 and follows in ``train()`` mode.
        options: see :class:`CombinedMarginLoss`; ``beyond_pi`` is "arcface" unless given. The paper's scale is 64.
            There is no label smoothing, and features have no length.

    Attributes:
        mean_cosine: () t.

    Raises:
        ValueError, TypeError: an option of another type or out of range.

    Source: Huang et al., CurricularFace, CVPR 2020, eq. 6 to 9.

    Example:
        >>> import torch
        >>> from ltloss import CurricularFaceLoss
        >>> loss_fn = CurricularFaceLoss(100, 16)
        >>> loss_fn(torch.randn(4, 16), torch.tensor([0, 7, 99, 3])).shape
        torch.Size([])
    """

    mean_cosine: Tensor
    _shown = ("momentum",)

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        margin: float = 0.5,
        momentum: float = 0.99,
        **options: Unpack[PriorOptions],
    ) -> None:
        options.setdefault("beyond_pi", "arcface")
        super().__init__(num_classes, embedding_size, angular_margin=margin, **options)
        self.momentum = float(check_number("momentum", momentum, at_least=0.0, at_most=1.0))
        self.register_buffer("mean_cosine", torch.zeros((), device=self._constants_device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the prototypes anew, and forget the cosines seen."""
        super().reset_parameters()
        if "mean_cosine" in self._buffers:  # not yet while the prototypes are drawn for the first time
            self.mean_cosine.zero_()

    @torch.no_grad()
    def _bend(self, cosine: Tensor, labels: Tensor) -> Bend:
        if self.training:
            counted = labels >= 0
            seen = torch.where(counted, cosine, 0.0).sum() / counted.sum()
            moved = self.mean_cosine.lerp(seen.to(self.mean_cosine), 1.0 - self.momentum)
            self.mean_cosine.copy_(torch.where(counted.any(), moved, self.mean_cosine))
        margin = Margin(self.angular_margin).of_samples(labels.clamp_min(0)).angular_margin
        return Bend((cosine.clamp(-1.0, 1.0).acos() + margin).cos(), p1=self.mean_cosine, p2=1.0)


class InterclassFilterLoss(SampleMarginLoss):
    """Combined margin without the classes that are too near to the sample: cos θ_c > threshold leaves the sum.

    Under noisy labels such a class may well be the sample's own under another name.

    Args:
        num_classes: C.
        embedding_size: D.
        filter_threshold: a cosine in (0, 1].
        angular_margin, cosine_margin: as in :class:`CombinedMarginLoss`.
        options: see :class:`CombinedMarginLoss`. There is no label smoothing, and features have no length.

    Raises:
        ValueError, TypeError: an option of another type or out of range.

    Source: InsightFace, ``interclass_filtering_threshold`` of ``arcface_torch``, which gives such a class the cosine 0.

    Example:
        >>> import torch
        >>> from ltloss import InterclassFilterLoss
        >>> loss_fn = InterclassFilterLoss(100, 16, filter_threshold=0.4, angular_margin=0.5)
        >>> loss_fn(torch.randn(4, 16), torch.tensor([0, 7, 99, 3])).shape
        torch.Size([])
    """

    _shown = ("filter_threshold",)

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        filter_threshold: float = 0.4,
        angular_margin: Tensor | float = 0.0,
        cosine_margin: Tensor | float = 0.0,
        **options: Unpack[PriorOptions],
    ) -> None:
        margins = {"angular_margin": angular_margin, "cosine_margin": cosine_margin}
        super().__init__(num_classes, embedding_size, **margins, **options)
        self.filter_threshold = float(check_number("filter_threshold", filter_threshold, above=0.0, at_most=1.0))

    def _bend(self, cosine: Tensor, labels: Tensor) -> Bend:
        return Bend(torch.full_like(cosine, self.filter_threshold), p0=-math.inf)
