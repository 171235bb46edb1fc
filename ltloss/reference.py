"""The mathematics, written to be read: dense, plain autograd, exact in float64.

Every function has the signature of its twin in :mod:`ltloss.functional` or :mod:`ltloss.contrastive` and is the law
that the fast implementations are tested against. Arguments are taken as valid. Everything is computed in the dtype of
the inputs (float32 for half precision), so ``torch.compile`` of these functions is also the dense competitor that the
benchmarks measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ltloss._deprecation import renamed_keywords
from ltloss._types import NearestPrototype, Reduction, TopK
from ltloss.margins import ANGLE_FLOOR, BeyondPi, Margin, MarginGradient, Objective, arccos
from ltloss.numerics import compute_dtype
from ltloss.regularizers import FeatureNormKind, norm_penalty

__all__ = [
    "cosine_logits",
    "cosine_logsumexp",
    "cosines",
    "direction",
    "feature_norm_penalty",
    "info_nce",
    "loss_of",
    "margin_cross_entropy",
    "min_angle_regularizer",
    "nearest_prototype",
    "products",
    "siglip_loss",
    "soft_label_cross_entropy",
    "supervised_contrastive",
    "top_k",
]


def direction(vectors: Tensor) -> Tensor:
    """v̂ = v/‖v‖ of every row (K, D), and 0 with gradient 0 for a zero row.

    Example:
        >>> import torch
        >>> from ltloss.reference import direction
        >>> direction(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    # A factor on a row changes no direction: rows whose squares would leave the range are brought to length about 1.
    largest = vectors.detach().abs().amax(1, keepdim=True)
    extreme = ((largest < 1e-15) | (largest > 1e15)) & (largest >= torch.finfo(vectors.dtype).tiny)
    vectors = vectors * torch.where(extreme, largest.reciprocal(), 1.0)
    norm = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return torch.where(norm == 0, 0.0, vectors) / torch.where(norm == 0, 1.0, norm)


def products(features: Tensor, prototypes: Tensor) -> Tensor:
    """x_i·w_c, the full (N, C) matrix of a linear layer.

    Example:
        >>> import torch
        >>> from ltloss.reference import products
        >>> products(torch.tensor([[3.0, 4.0]]), torch.eye(2))
        tensor([[3., 4.]])
    """
    dtype = compute_dtype(features, prototypes)
    with torch.autocast(features.device.type, enabled=False):  # it would form the product in half precision
        return features.to(dtype) @ prototypes.to(dtype).t()


def cosines(features: Tensor, prototypes: Tensor) -> Tensor:
    """cos_ic = x̂_i·ŵ_c, the full (N, C) matrix that the fast implementations never store.

    Of prototypes (C, K, D), K sub-centres a class, the largest of the K, of equal ones the first.

    Example:
        >>> import torch
        >>> from ltloss.reference import cosines
        >>> cosines(torch.tensor([[3.0, 4.0]]), torch.eye(2))
        tensor([[0.6000, 0.8000]])
    """
    dtype = compute_dtype(features, prototypes)
    with torch.autocast(features.device.type, enabled=False):
        found = products(direction(features.to(dtype)), direction(prototypes.to(dtype).flatten(0, -2)))
        return found if prototypes.dim() == 2 else found.view(-1, *prototypes.shape[:2]).max(2).values


def _logits(features: Tensor, prototypes: Tensor, objective: Objective) -> tuple[Tensor, Tensor | float]:
    """Without prior: (N, C) cosines, or products with what keeps its length; and the factor: s, or s·‖x‖ (N, 1)."""
    if objective.normalize_prototypes:
        cosine = cosines(features, prototypes)
        if objective.normalize_features:
            return cosine, objective.scale
        return cosine, objective.scale * torch.linalg.vector_norm(features.to(cosine.dtype), dim=1, keepdim=True)
    if objective.normalize_features:
        features = direction(features.to(compute_dtype(features, prototypes)))
    return products(features, prototypes), objective.scale


def cosine_logits(features: Tensor, prototypes: Tensor, scale: float, normalize_features: bool = True) -> Tensor:
    """s·cos_ic (N, C), times ‖x_i‖ where a feature keeps its length: what prediction takes the largest of.

    Example:
        >>> import torch
        >>> from ltloss.reference import cosine_logits
        >>> cosine_logits(torch.tensor([[3.0, 4.0]]), torch.eye(2), 2.0, normalize_features=False)
        tensor([[6., 8.]])
    """
    logits = scale * cosines(features, prototypes)
    if not normalize_features:
        logits = logits * torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=logits.dtype)
    return logits


def _with_margin(cosine: Tensor, margin: Margin) -> Tensor:
    """cos(m1·θ + m2) − m3, continued beyond π, its slope at θ kept ANGLE_FLOOR away from 0 and π."""
    limit = math.cos(ANGLE_FLOOR)
    inside = _turned(cosine + (cosine.clamp(-limit, limit) - cosine).detach(), margin)
    turned = inside + (_turned(cosine, margin) - inside).detach() - margin.cosine_margin
    return cosine + (turned - cosine).detach() if margin.margin_gradient == "straight_through" else turned


def _turned(cosine: Tensor, margin: Margin) -> Tensor:
    """cos(m1·θ + m2), continued beyond π, m2 a number or a vector (N,); θ + 0 leaves the cosine alone."""
    m2 = torch.as_tensor(margin.angular_margin)
    phase = margin.angle_multiplier * arccos(cosine) + m2
    if margin.beyond_pi == "monotone":
        # Beyond π: −2 − cos; in general (−1)^k cos − 2k on the k-th stretch of length π (SphereFace).
        k = torch.floor(phase / math.pi).clamp_min(0).detach()
        turned = torch.where(k % 2 == 0, 1.0, -1.0) * phase.cos() - 2 * k
    elif margin.beyond_pi == "arcface":
        turned = torch.where(phase > math.pi, cosine - m2 * m2.sin(), phase.cos())
    elif margin.beyond_pi == "easy":
        turned = torch.where(cosine > 0, phase.cos(), cosine)
    else:
        turned = (phase.clamp(0, math.pi) if margin.beyond_pi == "clip" else phase).cos()
    return torch.where((m2 == 0) & (margin.angle_multiplier == 1.0), cosine, turned)


def _per_sample(values: Tensor | float, labels: Tensor, like: Tensor) -> Tensor:
    """A number or a (C,) vector, as one value per sample (N,)."""
    values = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    return values[labels] if values.dim() else values.expand(labels.shape)


def _others_and_target(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """r_i = log Σ_{c≠y} exp(l_ic) and t_i = l_{i,y}; a label outside [0, C) has no target class here (t = 0)."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    is_each = labels[..., None] == classes  # (N, C), or of samples with several labels (N, k, C)
    is_target = is_each if labels.dim() == 1 else is_each.any(1)
    target_logit = torch.where(is_each, logits if labels.dim() == 1 else logits[:, None], 0.0).sum(-1)
    others = torch.where(is_target, -math.inf, logits)
    # log Σ over nothing is −inf; torch.logsumexp agrees but has no gradient there.
    nothing = (others == -math.inf).all(1)
    logsumexp = torch.logsumexp(torch.where(nothing[:, None], 0.0, others), 1)
    return torch.where(nothing, -math.inf, logsumexp), target_logit


def cosine_logsumexp(
    features: Tensor, prototypes: Tensor, labels: Tensor, *, scale: float, log_prior: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Dense twin of :func:`ltloss.functional.cosine_logsumexp`."""
    logits = scale * cosines(features, prototypes)
    return _others_and_target(logits if log_prior is None else logits + log_prior, labels)


def logsumexp_stats(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    objective: Objective,
    with_logit_sum: bool,
    bend: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Dense twin of :func:`ltloss.ops.stats.logsumexp_stats`."""
    log_prior = objective.log_prior
    if objective.ignore_index is not None:
        first = labels if labels.dim() == 1 else labels[:, 0]
        features = torch.where((first == objective.ignore_index)[:, None], 0.0, features)
        labels = torch.where(labels == objective.ignore_index, -1, labels)
    product, scale = _logits(features, prototypes, objective)
    logits = scale * product
    _, target = _others_and_target(logits, labels)
    others = logits
    threshold, polynomial = bend
    if threshold is not None and polynomial is not None:
        p0, p1, p2 = polynomial
        others = torch.where(logits > threshold[:, None], p0 + p1 * logits + p2 * logits**2, logits)
    r, _ = _others_and_target(others if log_prior is None else others + log_prior, labels)
    return r, target, logits.sum(1) if with_logit_sum else None


def margin_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    scale: float = 30.0,
    angular_margin: Tensor | float = 0.0,
    cosine_margin: Tensor | float = 0.0,
    angle_multiplier: float = 1.0,
    log_prior: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    normalize_features: bool = True,
    normalize_prototypes: bool = True,
    bias: Tensor | None = None,
    beyond_pi: BeyondPi = "monotone",
    margin_gradient: MarginGradient = "exact",
    reduction: Reduction = "mean",
) -> Tensor:
    """Dense twin of :func:`ltloss.functional.margin_cross_entropy`."""
    objective = Objective.named(
        scale=scale,
        angular_margin=angular_margin,
        cosine_margin=cosine_margin,
        angle_multiplier=angle_multiplier,
        log_prior=log_prior,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        normalize_features=normalize_features,
        normalize_prototypes=normalize_prototypes,
        bias=bias,
        beyond_pi=beyond_pi,
        margin_gradient=margin_gradient,
        reduction=reduction,
    )
    return loss_of(features, prototypes, labels, objective)


def loss_of(features: Tensor, prototypes: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """:func:`margin_cross_entropy` with its options as one object."""
    smoothing = objective.label_smoothing
    labels = labels.to(torch.int64)  # -100 compared with uint8 would be 156
    counted = torch.ne(labels, -1 if objective.ignore_index is None else objective.ignore_index)
    y = torch.where(counted, labels, 0)
    features = torch.where(counted[:, None], features, 0.0)
    cosine, per_row = _logits(features, prototypes, objective)
    s = per_row[:, 0] if isinstance(per_row, Tensor) else per_row
    prior = cosine.new_zeros(cosine.shape[1])
    for offset in (objective.log_prior, objective.bias):
        prior = prior if offset is None else prior + offset.to(cosine.dtype)
    target_cosine = cosine.gather(1, y[:, None])[:, 0]
    margin = target_cosine
    if objective.normalize_prototypes:
        margin = _with_margin(
            target_cosine,
            objective.margin._replace(
                angular_margin=_per_sample(objective.margin.angular_margin, y, cosine),
                cosine_margin=_per_sample(objective.margin.cosine_margin, y, cosine),
            ),
        )
    z = s * margin + prior[y]
    logits = (per_row * cosine + prior).scatter(1, y[:, None], z[:, None])
    r, _ = _others_and_target(logits, y)
    losses = -F.logsigmoid(z - r)  # = log(e^r + e^z) − z, without cancellation
    if smoothing:
        losses = losses + smoothing * (z - logits.mean(1))
    weights = counted * _per_sample(1.0 if objective.class_weight is None else objective.class_weight, y, cosine)
    losses = torch.where(counted, losses * weights, 0.0)
    return _reduced(losses, weights.sum(), objective.reduction)


def _reduced(losses: Tensor, total: Tensor, reduction: Reduction) -> Tensor:
    """The losses (N,), their sum, or their mean: over ``total``, or over 1 where that is 0."""
    if reduction == "none":
        return losses
    return losses.sum() / torch.where(total == 0, 1.0, total) if reduction == "mean" else losses.sum()


def soft_label_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    label_weight: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    **options: Any,
) -> Tensor:
    """Dense twin of :func:`ltloss.soft_labels.soft_label_cross_entropy`: a pass for each place."""
    counted = (labels[:, :1] != ignore_index) & (labels != ignore_index)
    weight = counted * label_weight
    if class_weight is not None:
        weight = weight * class_weight[torch.where(counted, labels, 0)]
    places = torch.where(counted, labels, -1).unbind(1)
    given = {**options, "ignore_index": -1, "reduction": "none"}
    each = [margin_cross_entropy(features, prototypes, one, **given) for one in places]
    losses = torch.where(weight > 0, torch.stack(each, 1) * weight, 0.0)
    return _reduced(losses.sum(1), weight.sum(), reduction)


@renamed_keywords(rows="classes", exact="not allow_tf32")
def nearest_prototype(
    prototypes: Tensor, classes: Tensor | None = None, *, allow_tf32: bool = True
) -> NearestPrototype:
    """Dense twin of :func:`ltloss.functional.nearest_prototype`: the whole C×C matrix.

    ``allow_tf32`` changes nothing.
    """
    own = torch.arange(prototypes.shape[0], device=prototypes.device) if classes is None else classes
    cosine = cosines(prototypes[own].flatten(0, -2), prototypes)
    if prototypes.dim() == 3:  # the nearest of the sub-centres of one class and those of the other
        cosine = cosine.view(len(own), prototypes.shape[1], -1).max(1).values
    if prototypes.shape[0] == 1:
        return NearestPrototype(cosine[:, 0] * 0.0 - 1.0, torch.full_like(own, -1))
    others = cosine.scatter(1, own[:, None], -math.inf)
    index = others.detach().argmax(1)  # the first, hence lowest, of equal ones
    return NearestPrototype(others.gather(1, index[:, None])[:, 0].clamp(-1.0, 1.0), index)


@renamed_keywords(power="count_exponent", rows="classes", exact="not allow_tf32")
def min_angle_regularizer(
    prototypes: Tensor,
    class_counts: Tensor | None = None,
    *,
    count_exponent: float = 0.25,
    classes: Tensor | None = None,
    allow_tf32: bool = True,
) -> Tensor:
    """Dense twin of :func:`ltloss.functional.min_angle_regularizer`. ``allow_tf32`` changes nothing."""
    cosine, _ = nearest_prototype(prototypes, classes)
    if prototypes.shape[0] == 1:
        return (cosine * 0.0).sum()
    counts = torch.ones_like(cosine) if class_counts is None else class_counts.to(cosine.dtype)
    if classes is not None and class_counts is not None:
        counts = counts[classes]
    weights = counts ** (-count_exponent)
    return -(weights / weights.sum() * arccos(cosine)).sum()


def feature_norm_penalty(
    features: Tensor, kind: FeatureNormKind | Callable[[Tensor], Tensor] = "ring", *, radius: float = 10.0
) -> Tensor:
    """Twin of :func:`ltloss.functional.feature_norm_penalty`; one formula on N numbers, so both share it."""
    return norm_penalty(features, kind, radius)


def info_nce(
    a: Tensor, b: Tensor, *, scale: float | Tensor, symmetric: bool = True, reduction: Reduction = "mean"
) -> Tensor:
    """Dense twin of :func:`ltloss.contrastive.info_nce`."""
    logits = scale * cosines(a, b)
    own = torch.arange(a.shape[0], device=a.device)
    losses = F.cross_entropy(logits, own, reduction="none")
    if symmetric:
        losses = (losses + F.cross_entropy(logits.t(), own, reduction="none")) / 2
    return _reduced(losses, torch.as_tensor(a.shape[0]), reduction)


def siglip_loss(a: Tensor, b: Tensor, *, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """Dense twin of :func:`ltloss.contrastive.siglip_loss`."""
    logits = scale * cosines(a, b) + bias
    z = 2 * torch.eye(a.shape[0], dtype=logits.dtype, device=a.device) - 1
    return -F.logsigmoid(z * logits).sum() / max(1, a.shape[0])


def supervised_contrastive(
    features: Tensor,
    labels: Tensor,
    queue_features: Tensor,
    queue_labels: Tensor,
    *,
    scale: float | Tensor,
    reduction: Reduction = "mean",
) -> Tensor:
    """Dense twin of :func:`ltloss.contrastive.supervised_contrastive`."""
    logits = scale * cosines(features, queue_features)
    positive = (labels[:, None] == queue_labels).to(logits.dtype)
    count = positive.sum(1)
    # A queue without entries has no softmax; its samples have no positives either.
    log_p = logits.log_softmax(1) if logits.shape[1] else logits
    losses = -(positive * log_p).sum(1) / count.clamp_min(1)
    return _reduced(losses, (count > 0).sum(), reduction)


def top_k(
    features: Tensor,
    prototypes: Tensor,
    k: int = 1,
    *,
    normalize_prototypes: bool = True,
    bias: Tensor | None = None,
) -> TopK:
    """Dense twin of :func:`ltloss.functional.top_k`."""
    cosine = cosines(features.detach(), prototypes.detach())
    logits = cosine
    if not normalize_prototypes:
        logits = products(features.detach(), prototypes.detach())
        logits = logits if bias is None else logits + bias.detach()
    index = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return TopK(cosine.gather(1, index).clamp(-1.0, 1.0), index)
