"""The losses as modules: each holds the prototypes, computes its loss and predicts.

``state_dict`` holds what is learned (``weight``, and centres where there are any). Margins, priors and weights come
from the constructor, so a state_dict moves freely between the losses that learn prototypes alone. Its metadata says
under which hyper-parameters it was saved; loading it into a module that has others warns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from ltloss import functional as F
from ltloss._types import Reduction
from ltloss.losses.prototype_head import PrototypeHead
from ltloss.margins import OPTION_NAMES, BeyondPi, MarginGradient, Objective
from ltloss.ops.logsumexp import Shard
from ltloss.soft_labels import soft_label_cross_entropy

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "ArcFaceLoss",
    "CombinedMarginLoss",
    "CosFaceLoss",
    "CosineSoftmaxLoss",
    "LossOptions",
    "PriorOptions",
]


class LossOptions(TypedDict, total=False):
    """What every loss module takes besides its own margin; see :func:`ltloss.functional.margin_cross_entropy`."""

    scale: float | None
    angle_multiplier: float
    class_weight: Tensor | None
    label_smoothing: float
    ignore_index: int
    normalize_features: bool
    beyond_pi: BeyondPi
    margin_gradient: MarginGradient
    reduction: Reduction
    sub_centers: int
    device: torch.device | str | None
    dtype: torch.dtype | None


class PriorOptions(LossOptions, total=False):
    """``LossOptions`` and a prior on the training logits, for the losses that do not bring their own."""

    log_prior: Tensor | None


class CombinedMarginLoss(PrototypeHead):
    """Cross-entropy with the combined margin cos(m1·θ + m2) − m3 on the target class: the general member of the family.

    Args:
        num_classes: C.
        embedding_size: D.
        scale: s; None as in :class:`PrototypeHead`.
        angle_multiplier: m1.
        angular_margin: m2 in radians, a number or (C,).
        cosine_margin: m3, a number or (C,).
        log_prior: (C,) added to the training logits, or None.
        class_weight: (C,) factor on the loss of each class, or None; see :meth:`set_class_weight` for schedules.
        label_smoothing, ignore_index, normalize_features, beyond_pi, margin_gradient, reduction: as in
            :func:`ltloss.functional.margin_cross_entropy`, which this module calls.
        sub_centers: K, 1 to 8 prototypes a class, of which the nearest counts.
        device, dtype: of the weight.

    Raises:
        ValueError, TypeError: an option of another type or out of range, when the module is made or the option set.

    Source: Deng et al., ArcFace, CVPR 2019, eq. 4.

    Example:
        >>> import torch
        >>> from ltloss import CombinedMarginLoss
        >>> loss_fn = CombinedMarginLoss(num_classes=1000, embedding_size=64, angular_margin=0.3, cosine_margin=0.2)
        >>> features, labels = torch.randn(8, 64, requires_grad=True), torch.randint(1000, (8,))
        >>> loss_fn(features, labels).backward()
        >>> loss_fn.predict(features, k=5).index.shape
        torch.Size([8, 5])
    """

    angular_margin: Tensor | float
    cosine_margin: Tensor | float
    log_prior: Tensor | None
    class_weight: Tensor | None

    _per_class = ("angular_margin", "cosine_margin", "log_prior", "class_weight")

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        scale: float | None = None,
        angle_multiplier: float = 1.0,
        angular_margin: Tensor | float = 0.0,
        cosine_margin: Tensor | float = 0.0,
        log_prior: Tensor | None = None,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        normalize_features: bool = True,
        beyond_pi: BeyondPi = "monotone",
        margin_gradient: MarginGradient = "exact",
        reduction: Reduction = "mean",
        sub_centers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_classes,
            embedding_size,
            scale=scale,
            normalize_features=normalize_features,
            sub_centers=sub_centers,
            device=device,
            dtype=dtype,
        )
        self.angle_multiplier, self.label_smoothing = angle_multiplier, label_smoothing
        self.ignore_index, self.reduction = ignore_index, reduction
        self.beyond_pi, self.margin_gradient = beyond_pi, margin_gradient
        self.angular_margin, self.cosine_margin = angular_margin, cosine_margin
        self.log_prior, self.class_weight = log_prior, class_weight
        # Bad options are refused here and not in the first training step.
        Objective.named(**self._options()).checked(num_classes, torch.empty(0, device=self._constants_device))

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OPTION_NAMES}

    def set_class_weight(self, class_weight: Tensor | None) -> None:
        """Replace the class weights (C,), or remove them with None: what a deferred schedule does at its epoch."""
        if class_weight is not None and not isinstance(class_weight, Tensor):
            raise TypeError(
                f"class_weight must be a tensor ({self.num_classes},) or None; got {type(class_weight).__name__}"
            )
        self.class_weight = class_weight

    def forward(
        self, features: Tensor, labels: Tensor, *, label_weight: Tensor | None = None, shard: Shard | None = None
    ) -> Tensor:
        """Loss of features (N, D) with labels (N,): a scalar, or (N,) for ``reduction="none"``.

        With ``label_weight`` (N, k) and labels (N, k) that of samples of several classes:
        :func:`ltloss.soft_labels.soft_label_cross_entropy`.
        """
        options = {**self._options(), **self._logit_options(), "shard": shard, "update": self.fused_update}
        if label_weight is None:
            return F.margin_cross_entropy(features, self.weight, labels, **options)
        return soft_label_cross_entropy(features, self.weight, labels, label_weight, **options)

    def hyper_parameters(self) -> dict[str, Any]:
        """Every hyper-parameter by name."""
        return {**super().hyper_parameters(), **self._options()}


class CosineSoftmaxLoss(CombinedMarginLoss):
    """Softmax cross-entropy on s·cos θ, no margin: the baseline to compare every margin with, at equal scale.

    Args:
        num_classes: C.
        embedding_size: D.
        options: see :class:`CombinedMarginLoss`.

    Source: Wang et al., NormFace, ACM MM 2017.

    Example:
        >>> import torch
        >>> from ltloss import CosineSoftmaxLoss
        >>> loss_fn = CosineSoftmaxLoss(100, 16, scale=16.0)
        >>> loss_fn(torch.randn(4, 16), torch.tensor([0, 7, 99, -100])).shape
        torch.Size([])
    """

    def __init__(self, num_classes: int, embedding_size: int, **options: Unpack[PriorOptions]) -> None:
        super().__init__(num_classes, embedding_size, **options)


class CosFaceLoss(CombinedMarginLoss):
    """Additive cosine margin: cos θ − margin on the target class (also called AM-Softmax).

    Args:
        num_classes: C.
        embedding_size: D.
        margin: m3, a number or (C,).
        options: see :class:`CombinedMarginLoss`.

    Sources: Wang et al., CosFace, CVPR 2018, eq. 4; Wang et al., Additive margin softmax, 2018.

    Example:
        >>> import torch
        >>> from ltloss import CosFaceLoss
        >>> loss_fn = CosFaceLoss(100, 16, margin=0.35)
        >>> loss_fn(torch.randn(4, 16), torch.tensor([0, 7, 99, 3])).shape
        torch.Size([])
    """

    def __init__(
        self, num_classes: int, embedding_size: int, *, margin: Tensor | float = 0.35, **options: Unpack[PriorOptions]
    ) -> None:
        super().__init__(num_classes, embedding_size, cosine_margin=margin, **options)


class ArcFaceLoss(CombinedMarginLoss):
    """Additive angular margin: cos(θ + margin) on the target class.

    Args:
        num_classes: C.
        embedding_size: D.
        margin: m2 in radians, a number or (C,).
        options: see :class:`CombinedMarginLoss`; ``beyond_pi="arcface"`` gives the original beyond θ + m = π.

    Source: Deng et al., ArcFace, CVPR 2019, eq. 3.

    Example:
        >>> import torch
        >>> from ltloss import ArcFaceLoss
        >>> loss_fn = ArcFaceLoss(100, 16, margin=0.5)
        >>> loss_fn(torch.randn(4, 16), torch.tensor([0, 7, 99, 3])).shape
        torch.Size([])
    """

    def __init__(
        self, num_classes: int, embedding_size: int, *, margin: Tensor | float = 0.5, **options: Unpack[PriorOptions]
    ) -> None:
        super().__init__(num_classes, embedding_size, angular_margin=margin, **options)
