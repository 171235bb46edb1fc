"""The long-tail loss, source A of ``docs/mathematics.md``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ltloss import functional as F
from ltloss._deprecation import renamed_fields, warn_deprecated
from ltloss._validation import check_choice, check_number, check_per_class, check_type
from ltloss.class_balance import Counts, Normalize, log_prior_from_counts, margins_from_counts
from ltloss.losses.count_losses import FromCounts, check_class_counts
from ltloss.losses.defaults import RENAMED_OPTIONS, of_form
from ltloss.losses.margin_losses import CombinedMarginLoss, PriorOptions
from ltloss.losses.prototype_head import NOT_NEGATIVE, POSITIVE, Checks
from ltloss.ops.labels import each_once
from ltloss.ops.logsumexp import Shard
from ltloss.ops.prototype_search import min_angle
from ltloss.regularizers import FeatureNormKind, mean_angle, norm_penalty

if TYPE_CHECKING:
    from typing import ParamSpec

    from typing_extensions import Unpack

    P = ParamSpec("P")

__all__ = ["LongTailLoss"]

AngleClasses = Literal["all", "batch"]

_OWN_OPTIONS = (
    "margin",
    "margin_power",
    "margin_normalize",
    "min_angle_weight",
    "min_angle_power",
    "min_angle_classes",
    "min_angle_allow_tf32",
    "feature_norm_weight",
    "feature_norm",
    "feature_norm_radius",
    "tau",
)


def _check_feature_norm(name: str, given: Any) -> None:
    if not callable(given):
        check_choice(name, given, get_args(FeatureNormKind))


def _with_form(init: Callable[P, None]) -> Callable[P, None]:
    """Let the constructor also take ``form``, an argument of version 0.1, with a warning."""

    @wraps(init)
    def constructor(*args: P.args, **given: P.kwargs) -> None:
        form = given.pop("form", None)
        if form is not None:
            values = of_form(form, given)
            given.update(values)
            instead = ", ".join(f"{name}={value!r}" for name, value in values.items()) or "nothing"
            warn_deprecated(f"form={form!r} of LongTailLoss goes with version 0.3; pass {instead} instead")
        init(*args, **given)

    return constructor


@renamed_fields(**RENAMED_OPTIONS, parts="terms")
class LongTailLoss(FromCounts, CombinedMarginLoss):
    """Source A: angular margins from the class counts, spread prototypes, long features. L = L1 + λ1·L2 + λ2·L3.

    * L1: margin cross-entropy with the target logit s·cos(θ + m_c), m_c = margin·n_c^(−margin_power).
    * L2: the count-weighted minimum-angle regulariser, :func:`ltloss.functional.min_angle_regularizer`.
    * L3: the feature-length penalty, :func:`ltloss.functional.feature_norm_penalty`.

    The source leaves λ1, λ2 and the function g of L3 open; the defaults are ours. ``tau=1`` adds the log prior of
    balanced softmax to the logits of L1. The method ``long-tail-prior`` of docs/evidence.md is this loss with
    ``tau=1, margin_normalize="max", min_angle_weight=0, feature_norm_weight=0``.

    Args:
        num_classes: C.
        embedding_size: D.
        class_counts: (C,) training samples per class, all > 0.
        margin: angular margin in radians of a class with one sample, or with ``margin_normalize="max"`` of the rarest
            class.
        margin_power: the exponent 1/k of the margins.
        margin_normalize: ``"none"``, or ``"max"`` to give the rarest class exactly ``margin``.
        min_angle_weight: λ1; 0 leaves L2 out.
        min_angle_power: the exponent 1/k of the weights of L2.
        min_angle_classes: the classes that L2 averages over in a step: ``"all"``, at the cost of C²·D/2, or those of
            the ``"batch"``, at the cost of N·C·D.
        min_angle_allow_tf32: ``allow_tf32`` of :func:`ltloss.functional.nearest_prototype` for L2.
        feature_norm_weight: λ2; 0 leaves L3 out. With ``normalize_features=False`` the features may then shrink to
            nothing.
        feature_norm: g of L3, by name or as a function of the lengths (N,). ``"ring"`` with λ2 = 0.1 measured best on
            long-tailed digits (docs/evidence-more.md).
        feature_norm_radius: R or u of that g, in units of length. None: 1.25·√D, a quarter more than the length of a
            feature after batch normalisation.
        tau: τ >= 0, the strength of the log prior τ·log π_c on the training logits; 0 adds none.
        options: see :class:`CombinedMarginLoss`.

    Attributes:
        terms: the terms of the last call, unweighted and detached:
            ``{"margin_cross_entropy": L1, "min_angle": L2, "feature_norm": L3}``, without those that were left out.

    Raises:
        ValueError, TypeError: an option of another type or out of range, in the constructor or when it is set.

    See also: :class:`ltloss.LDAMLoss`, with such margins on the cosine; :class:`ltloss.LogitAdjustedLoss`, with the
    prior alone.

    Sources: L1 and L2, source A of ``docs/mathematics.md``; the prior, Ren et al., Balanced meta-softmax, NeurIPS 2020.

    Example:
        >>> import torch
        >>> from ltloss import LongTailLoss
        >>> loss_fn = LongTailLoss.from_counts([500, 40, 3], embedding_size=16)
        >>> loss = loss_fn(torch.randn(4, 16), torch.tensor([0, 0, 1, 2]))
        >>> sorted(loss_fn.terms)
        ['feature_norm', 'margin_cross_entropy', 'min_angle']
        >>> loss_fn = LongTailLoss.from_counts([500, 40, 3], 16, tau=1, min_angle_weight=0, feature_norm_weight=0)
        >>> loss = loss_fn(torch.randn(4, 16), torch.tensor([0, 0, 1, 2]))
        >>> sorted(loss_fn.terms)
        ['margin_cross_entropy']
    """

    class_counts: Tensor

    _settled = ("class_counts", "margin", "margin_power", "margin_normalize", "tau")
    _checks: ClassVar[Checks] = {
        **dict.fromkeys(("min_angle_weight", "min_angle_power", "feature_norm_weight"), NOT_NEGATIVE),
        "min_angle_classes": partial(check_choice, known=get_args(AngleClasses)),
        "min_angle_allow_tf32": partial(check_type, expected=bool),
        "feature_norm": _check_feature_norm,
        "feature_norm_radius": POSITIVE,
    }

    @_with_form
    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        class_counts: Counts,
        margin: float = 0.5,
        margin_power: float = 0.25,
        margin_normalize: Normalize = "none",
        min_angle_weight: float = 0.1,
        min_angle_power: float = 0.25,
        min_angle_classes: AngleClasses = "all",
        min_angle_allow_tf32: bool = True,
        feature_norm_weight: float = 0.1,
        feature_norm: FeatureNormKind | Callable[[Tensor], Tensor] = "ring",
        feature_norm_radius: float | None = None,
        tau: float = 0.0,
        **options: Unpack[PriorOptions],
    ) -> None:
        check_class_counts(class_counts, num_classes)
        check_number("tau", tau, at_least=0.0)
        if tau:
            if options.get("log_prior") is not None:
                raise ValueError(
                    f"tau and log_prior both set the log prior; pass one of them; got tau={tau:g} and a log_prior"
                )
            options["log_prior"] = log_prior_from_counts(class_counts, tau)
        margins = margins_from_counts(class_counts, margin, count_exponent=margin_power, normalize=margin_normalize)
        if bool((margins > math.pi).any()):  # refused here, by the name that was given
            check_per_class("margin", float(margin), num_classes, margins, kind="angular_margin")
        super().__init__(num_classes, embedding_size, angular_margin=margins, **options)
        self.margin, self.margin_power, self.margin_normalize, self.tau = margin, margin_power, margin_normalize, tau
        self.min_angle_weight, self.min_angle_power = min_angle_weight, min_angle_power
        self.min_angle_classes, self.min_angle_allow_tf32 = min_angle_classes, min_angle_allow_tf32
        self.feature_norm_weight, self.feature_norm = feature_norm_weight, feature_norm
        self.feature_norm_radius = 1.25 * embedding_size**0.5 if feature_norm_radius is None else feature_norm_radius
        counts = torch.as_tensor(class_counts, device=None if isinstance(class_counts, Tensor) else "cpu")
        self._keep("class_counts", counts)
        self.terms: dict[str, Tensor] = {}

    def forward(
        self, features: Tensor, labels: Tensor, *, label_weight: Tensor | None = None, shard: Shard | None = None
    ) -> Tensor:
        """Compute L1 + λ1·L2 + λ2·L3 of a batch.

        Args:
            features: (N, D).
            labels: (N,); or (N, k), the classes of each sample, with ``label_weight``.
            label_weight: (N, k), the weight of each of these classes.
            shard: the classes that were drawn; :func:`ltloss.distributed.parallelize` passes it.

        Returns:
            A scalar; or (N,) for ``reduction="none"``, where L2 and L3 are added to the loss of every sample that
            counts.
        """
        loss = super().forward(features, labels, label_weight=label_weight, shard=shard)
        parts = {"margin_cross_entropy": loss.detach()}
        regularizers = []
        labels = labels.to(torch.int64)  # compared with uint8, -100 would wrap to 156
        labels = labels if labels.dim() == 1 else each_once(labels, self.ignore_index)
        each_counted = labels != self.ignore_index
        counted = each_counted if labels.dim() == 1 else each_counted[:, 0]
        if self.min_angle_weight:
            weight = self.weight if self.fused_update is None else self.fused_update.joined(loss)
            angle = self._min_angle(weight, labels.flatten(), each_counted.flatten())
            parts["min_angle"] = angle.detach()
            regularizers.append(self.min_angle_weight * angle)
        if self.feature_norm_weight:
            length = norm_penalty(features, self.feature_norm, self.feature_norm_radius, counted)
            parts["feature_norm"] = length.detach()
            regularizers.append(self.feature_norm_weight * length)
        self.terms = parts
        for term in regularizers:
            loss = loss + (torch.where(counted, term, 0.0) if self.reduction == "none" else term)
        return loss

    def _min_angle(self, weight: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        """L2 over all classes, or over those of the batch, each once."""
        power, allow_tf32 = self.min_angle_power, self.min_angle_allow_tf32
        if self.min_angle_classes == "all":
            return min_angle(weight, self.class_counts, power, None, allow_tf32)
        # Not torch.unique: the host would have to wait for the number of classes.
        beyond = self.num_classes
        rows = torch.where(counted, labels, beyond).sort().values
        first = (rows < beyond) & (torch.cat([rows.new_full((1,), -1), rows[:-1]]) != rows)
        rows = rows.clamp(0, beyond - 1)
        cosine = F.nearest_prototype(weight, rows, allow_tf32=allow_tf32).cosine
        weights = torch.where(first, self.class_counts[rows].to(cosine.dtype) ** -power, 0.0)
        angle = mean_angle(cosine, weights)
        return angle if beyond > 1 else angle * 0.0

    def hyper_parameters(self) -> dict[str, Any]:
        """Return every hyper-parameter by name."""
        return {**super().hyper_parameters(), **{name: getattr(self, name) for name in _OWN_OPTIONS}}
