"""From the two numbers per sample to the loss: work on N-vectors only.

:func:`one_pass` does the wide work once; any number of margins can then be put on its result (:func:`margin_losses`),
which is how the cosine-space loss gets two losses out of one pass, and where a class-parallel reduction goes in
between.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ltloss import autograd as _gradients  # noqa: F401 - importing it attaches the gradients to the operators
from ltloss import ops
from ltloss._types import Reduction
from ltloss.chunked.logsumexp import compute_dtype
from ltloss.margins import BeyondPi, MarginGradient, margin_cosine

__all__ = [
    "OnePass",
    "fused_margin_cross_entropy",
    "gather_per_class",
    "margin_losses",
    "one_pass",
    "reduce_losses",
    "wide_pass",
]


class OnePass(NamedTuple):
    """What a pass over the prototypes leaves per sample.

    ``labels`` (N,) int64, -1 where ignored. ``other_logsumexp`` (N,) r. ``own_logit`` (N,) s·cos_y without the prior.
    ``logit_scale`` s, or (N,) s·‖x‖ where the features keep their length. ``own_prior`` (N,) or 0.
    ``logit_sum`` (N,) Σ_c l_c over all classes, prior included, if it was asked for. ``num_classes`` C.
    """

    labels: Tensor
    other_logsumexp: Tensor
    own_logit: Tensor
    logit_scale: Tensor | float
    own_prior: Tensor | float
    logit_sum: Tensor | None
    num_classes: int


def gather_per_class(values: Tensor | float, labels: Tensor) -> Tensor | float:
    """Values of each sample's class, (N,); a number stays a number. Never reads outside the vector."""
    if isinstance(values, float) or values.dim() == 0:
        return values
    return values[labels.clamp(0, values.shape[0] - 1)]


def wide_pass(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    scale: float,
    normalize_features: bool,
    with_logit_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three N-vectors of :func:`ltloss.ops.cosine_logsumexp`, also where the prototypes lie on several ranks."""
    arguments = (features, prototypes, labels, log_prior, scale, normalize_features, with_logit_sum)
    if ops.is_sharded(prototypes):
        return ops.distributed("logsumexp").cosine_logsumexp(*arguments)  # type: ignore[no-any-return]
    other, own, logit_sum, _, _ = ops.cosine_logsumexp(*arguments)
    return other, own, logit_sum


def one_pass(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    scale: float,
    log_prior: Tensor | None = None,
    normalize_features: bool = True,
    ignore_index: int = -100,
    with_logit_sum: bool = False,
) -> OnePass:
    """Check the labels, pass over the prototypes once, and gather what the own-class logit needs."""
    num_classes = prototypes.shape[0]
    labels = ops.checked_labels(labels, num_classes, ignore_index)
    # An ignored sample sends nothing back, not even NaN times zero (padding is often not initialised).
    features = features.masked_fill((labels < 0)[:, None], 0.0)
    other, own, logit_sum = wide_pass(
        features, prototypes, labels, log_prior, scale, normalize_features, with_logit_sum
    )
    # Only reached on a GPU, where labels are not looked at: a label past the last class must not pass for a good
    # sample.
    own = own.masked_fill(labels >= num_classes, float("nan"))
    logit_scale: Tensor | float = scale
    if not normalize_features:
        logit_scale = scale * torch.linalg.vector_norm(features, dim=1, dtype=compute_dtype(features, prototypes))
    own_prior: Tensor | float = 0.0 if log_prior is None else gather_per_class(log_prior, labels)
    if with_logit_sum and log_prior is not None:
        logit_sum = logit_sum + log_prior.sum()
    return OnePass(labels, other, own, logit_scale, own_prior, logit_sum if with_logit_sum else None, num_classes)


def margin_losses(
    result: OnePass,
    *,
    angular_margin: Tensor | float = 0.0,
    cosine_margin: Tensor | float = 0.0,
    angle_multiplier: float = 1.0,
    label_smoothing: float = 0.0,
    beyond_pi: BeyondPi = "monotone",
    margin_gradient: MarginGradient = "exact",
) -> Tensor:
    """Per-sample losses (N,), unweighted, 0 where ignored.

    With z = scale·margin(cos_y) + prior_y: loss = log(e^r + e^z) − z = softplus(r − z), which neither cancels nor has
    a floor. Margins are numbers or (C,) vectors.
    """
    scale = result.logit_scale
    # A zero feature that keeps its length has logit 0 and direction 0; the bound only makes 0/0 into 0.
    divisor = scale.clamp_min(torch.finfo(scale.dtype).tiny) if isinstance(scale, Tensor) else scale
    own_with_margin = scale * margin_cosine(
        result.own_logit / divisor,
        angular_margin=gather_per_class(angular_margin, result.labels),
        cosine_margin=gather_per_class(cosine_margin, result.labels),
        angle_multiplier=angle_multiplier,
        beyond_pi=beyond_pi,
        margin_gradient=margin_gradient,
    )
    z = own_with_margin + result.own_prior
    losses = -F.logsigmoid(z - result.other_logsumexp)
    if label_smoothing > 0.0 and result.logit_sum is not None:
        # (1-e)(lse - z) + e(lse - mean z) with lse = loss + z; the own class enters the mean with its margin.
        mean = (result.logit_sum - result.own_logit + own_with_margin) / result.num_classes
        losses = losses + label_smoothing * (z - mean)
    return losses.masked_fill(result.labels < 0, 0.0)


def reduce_losses(losses: Tensor, labels: Tensor, class_weight: Tensor | float | None, reduction: Reduction) -> Tensor:
    """Weight the losses (N,) by class and reduce them; ``mean`` divides by the summed weights of the counted samples.

    A mean over nothing (no sample, or all ignored) is 0, with zero gradients.
    """
    counted = (labels >= 0).to(losses.dtype)
    weights = counted * (1.0 if class_weight is None else gather_per_class(class_weight, labels))
    weighted = losses * weights
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    total = weights.sum()
    return weighted.sum() / torch.where(total == 0, 1.0, total)


def fused_margin_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    scale: float,
    angular_margin: Tensor | float,
    cosine_margin: Tensor | float,
    class_weight: Tensor | float | None,
    log_prior: Tensor | None,
    angle_multiplier: float,
    label_smoothing: float,
    ignore_index: int,
    normalize_features: bool,
    beyond_pi: BeyondPi,
    margin_gradient: MarginGradient,
    reduction: Reduction,
) -> Tensor:
    """The same as :func:`one_pass`, :func:`margin_losses` and :func:`reduce_losses`, in the kernels' one operator."""
    given = (angular_margin, cosine_margin, 1.0 if class_weight is None else class_weight)
    vectors = [v.expand(prototypes.shape[0]) if isinstance(v, Tensor) else None for v in given]
    numbers = [0.0 if isinstance(v, Tensor) else v for v in given]
    loss: Tensor = ops.fused_margin_cross_entropy(
        features,
        prototypes,
        labels,
        log_prior,
        *vectors,
        *numbers,
        scale,
        float(angle_multiplier),
        float(label_smoothing),
        ignore_index,
        normalize_features,
        beyond_pi,
        margin_gradient,
        reduction,
    )[0]
    return loss
