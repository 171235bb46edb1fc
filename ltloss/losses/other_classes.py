"""Losses that also change the logits of other classes, depending on their cosine to the sample."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ltloss._validation import check_number
from ltloss.extend import Bend
from ltloss.losses.margin_losses import PriorOptions
from ltloss.losses.prototype_head import FRACTION, Checks, Names
from ltloss.losses.sample_margins import SampleMarginLoss
from ltloss.margins import Margin

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["CurricularFaceLoss", "InterclassFilterLoss"]


class CurricularFaceLoss(SampleMarginLoss):
    """ArcFace that weights hard classes, those with cos θ_c > cos(θ_y + m), more and more as training proceeds.

    The target logit is s·cos(θ_y + m). The logit of a hard class is s·cos θ_c·(t + cos θ_c), with t the running mean
    of the target cosines.

    Args:
        num_classes: C.
        embedding_size: D.
        margin: m in radians.
        momentum: momentum of the running mean t, in [0, 1]. t starts at 0 and is updated in ``train()`` mode.
        options: see :class:`ltloss.CombinedMarginLoss`; the default of ``beyond_pi`` is "arcface". Neither label
            smoothing nor ``normalize_features=False`` is possible. The scale of the paper is 64.

    Attributes:
        mean_cosine: t, a 0-d buffer.

    Raises:
        ValueError, TypeError: an option of another type or out of range.

    See also: :class:`ltloss.ArcFaceLoss`, without the weighting; :class:`InterclassFilterLoss`, which removes near
    classes.

    Source: Huang et al., CurricularFace, CVPR 2020, eq. 6 to 9.

    Example:
        >>> import torch
        >>> from ltloss import CurricularFaceLoss
        >>> loss_fn = CurricularFaceLoss(100, 16)
        >>> loss_fn(torch.randn(4, 16), torch.tensor([0, 7, 99, 3])).shape
        torch.Size([])
    """

    mean_cosine: Tensor
    _called: ClassVar[Names] = {"angular_margin": "margin (angular_margin)"}
    _shown = ("momentum",)
    _checks: ClassVar[Checks] = {"momentum": FRACTION}

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
        self.momentum = momentum
        self.register_buffer("mean_cosine", torch.zeros((), device=self._constants_device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new prototypes and reset the running mean."""
        super().reset_parameters()
        if "mean_cosine" in self._buffers:  # not yet in the first call, by the constructor of the base class
            self.mean_cosine.zero_()

    @torch.no_grad()
    def _bend(self, cosine: Tensor, labels: Tensor) -> Bend:
        if self.training:
            counted = (labels >= 0) & cosine.isfinite()  # NaN would stay, though its step is skipped
            seen = torch.where(counted, cosine, 0.0).sum() / counted.sum()
            moved = self.mean_cosine.lerp(seen.to(self.mean_cosine), 1.0 - self.momentum)
            self.mean_cosine.copy_(torch.where(counted.any(), moved, self.mean_cosine))
        margin = Margin(self.angular_margin).of_samples(labels).angular_margin
        return Bend((cosine.clamp(-1.0, 1.0).acos() + margin).cos(), p1=self.mean_cosine, p2=1.0)


class InterclassFilterLoss(SampleMarginLoss):
    """Combined margin loss whose softmax leaves out other classes with cos θ_c > threshold.

    With noisy labels, a class so near to the sample may be its true class.

    Args:
        num_classes: C.
        embedding_size: D.
        filter_threshold: a cosine in (0, 1].
        angular_margin, cosine_margin: a number or (C,), as in :class:`ltloss.CombinedMarginLoss`.
        options: see :class:`ltloss.CombinedMarginLoss`. Neither label smoothing nor ``normalize_features=False`` is
            possible.

    Raises:
        ValueError, TypeError: an option of another type or out of range.

    See also: :class:`CurricularFaceLoss`, which weights near classes more instead.

    Source: InsightFace, ``interclass_filtering_threshold`` of ``arcface_torch``. There such a class keeps the cosine 0
    instead of leaving the softmax.

    Example:
        >>> import torch
        >>> from ltloss import InterclassFilterLoss
        >>> loss_fn = InterclassFilterLoss(100, 16, filter_threshold=0.4, angular_margin=0.5)
        >>> loss_fn(torch.randn(4, 16), torch.tensor([0, 7, 99, 3])).shape
        torch.Size([])
    """

    _shown = ("filter_threshold",)
    _checks: ClassVar[Checks] = {"filter_threshold": partial(check_number, above=0.0, at_most=1.0)}

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
        self.filter_threshold = filter_threshold

    def _bend(self, cosine: Tensor, labels: Tensor) -> Bend:
        return Bend(torch.full_like(cosine, self.filter_threshold), p0=-math.inf)
