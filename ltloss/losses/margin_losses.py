"""The general loss module of the family, and the ones with a single margin for all classes.

The ``state_dict`` holds what is learned: ``weight``, and centres if there are any. Margins, priors and class weights
come from the constructor. A state_dict can therefore be loaded into any loss that learns prototypes alone. Its metadata
records the hyper-parameters; loading it into a module with others warns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import torch
from torch import Tensor

from ltloss import functional as F
from ltloss._types import Reduction
from ltloss.losses.prototype_head import Names, PrototypeHead
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
    """Options of every loss module besides its own margin; see :func:`ltloss.functional.margin_cross_entropy`."""

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
    """``LossOptions`` and a log prior on the training logits, for losses that do not set one themselves."""

    log_prior: Tensor | None


class CombinedMarginLoss(PrototypeHead):
    """Cross-entropy with the combined margin cos(m1·θ + m2) − m3 on the target class: the general loss of the family.

    Args:
        num_classes: C.
        embedding_size: D.
        scale: s; None: the default of :class:`PrototypeHead`.
        angle_multiplier: m1.
        angular_margin: m2 in radians, a number or (C,).
        cosine_margin: m3 in [-2, 2], a number or (C,).
        log_prior: (C,) added to the training logits, or None.
        class_weight: (C,) factor on the loss of each class, or None. :meth:`set_class_weight` changes it later.
        label_smoothing, ignore_index, normalize_features, beyond_pi, margin_gradient, reduction: as in
            :func:`ltloss.functional.margin_cross_entropy`, which this module calls.
        sub_centers: K, 1 to 8 prototypes per class. The nearest one determines the cosine of the class.
        device, dtype: device and dtype of the weight, as in :class:`PrototypeHead`.

    Raises:
        ValueError, TypeError: an option of another type or out of range, in the constructor or when it is set.

    See also: :class:`ArcFaceLoss` and :class:`CosFaceLoss`, which set one margin;
    :func:`ltloss.functional.margin_cross_entropy`, the loss without a module.

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
        # So that bad options raise here and not in the first training step.
        Objective.named(**self._options()).checked(num_classes, torch.empty(0, device=self._constants_device))

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OPTION_NAMES}

    def set_class_weight(self, class_weight: Tensor | None) -> None:
        """Replace the class weights, for instance at the epoch of a deferred schedule.

        Args:
            class_weight: (C,), finite and >= 0, or None to remove them.

        Raises:
            TypeError, ValueError: not a tensor, another shape, a value out of range.

        See also: :class:`ltloss.class_balance.DeferredWeights`.
        """
        if class_weight is not None and not isinstance(class_weight, Tensor):
            raise TypeError(
                f"class_weight must be a tensor ({self.num_classes},) or None; got {type(class_weight).__name__}"
            )
        self.class_weight = class_weight

    def forward(
        self, features: Tensor, labels: Tensor, *, label_weight: Tensor | None = None, shard: Shard | None = None
    ) -> Tensor:
        """Compute the loss of a batch.

        Args:
            features: (N, D).
            labels: (N,); or (N, k), the classes of each sample, with ``label_weight``.
            label_weight: (N, k), the weight of each of these classes; see
                :func:`ltloss.soft_labels.soft_label_cross_entropy`.
            shard: the classes that were drawn; :func:`ltloss.distributed.parallelize` passes it.

        Returns:
            A scalar, or (N,) for ``reduction="none"``.
        """
        options = {**self._options(), **self._logit_options(), "shard": shard, "update": self.fused_update}
        if label_weight is None:
            return F.margin_cross_entropy(features, self.weight, labels, **options)
        return soft_label_cross_entropy(features, self.weight, labels, label_weight, **options)

    def hyper_parameters(self) -> dict[str, Any]:
        """Return every hyper-parameter by name."""
        return {**super().hyper_parameters(), **self._options()}


class CosineSoftmaxLoss(CombinedMarginLoss):
    """Softmax cross-entropy on s·cos θ, without a margin: the baseline for every margin at the same scale.

    Args:
        num_classes: C.
        embedding_size: D.
        options: see :class:`CombinedMarginLoss`.

    See also: :class:`ltloss.LinearSoftmaxLoss`, the baseline without cosines.

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
    """Additive cosine margin: the target logit is s·(cos θ − m). Also called AM-Softmax.

    Args:
        num_classes: C.
        embedding_size: D.
        margin: m in [-2, 2], a number or (C,).
        options: see :class:`CombinedMarginLoss`.

    See also: :class:`ltloss.LDAMLoss`, with a margin per class from the class counts; :class:`ArcFaceLoss`, with a
    margin on the angle.

    Sources: Wang et al., CosFace, CVPR 2018, eq. 4; Wang et al., Additive margin softmax, 2018.

    Example:
        >>> import torch
        >>> from ltloss import CosFaceLoss
        >>> loss_fn = CosFaceLoss(100, 16, margin=0.35)
        >>> loss_fn(torch.randn(4, 16), torch.tensor([0, 7, 99, 3])).shape
        torch.Size([])
    """

    _called: ClassVar[Names] = {"cosine_margin": "margin (cosine_margin)"}

    def __init__(
        self, num_classes: int, embedding_size: int, *, margin: Tensor | float = 0.35, **options: Unpack[PriorOptions]
    ) -> None:
        super().__init__(num_classes, embedding_size, cosine_margin=margin, **options)


class ArcFaceLoss(CombinedMarginLoss):
    """Additive angular margin: the target logit is s·cos(θ + m).

    Args:
        num_classes: C.
        embedding_size: D.
        margin: m in radians, a number or (C,).
        options: see :class:`CombinedMarginLoss`. ``beyond_pi="arcface"`` continues beyond θ + m = π as the paper does.

    See also: :class:`ltloss.LongTailLoss`, with a margin per class from the class counts; :class:`ltloss.AdaFaceLoss`
    and :class:`ltloss.MagFaceLoss`, with a margin per sample.

    Source: Deng et al., ArcFace, CVPR 2019, eq. 3.

    Example:
        >>> import torch
        >>> from ltloss import ArcFaceLoss
        >>> loss_fn = ArcFaceLoss(100, 16, margin=0.5)
        >>> loss_fn(torch.randn(4, 16), torch.tensor([0, 7, 99, 3])).shape
        torch.Size([])
    """

    _called: ClassVar[Names] = {"angular_margin": "margin (angular_margin)"}

    def __init__(
        self, num_classes: int, embedding_size: int, *, margin: Tensor | float = 0.5, **options: Unpack[PriorOptions]
    ) -> None:
        super().__init__(num_classes, embedding_size, angular_margin=margin, **options)
