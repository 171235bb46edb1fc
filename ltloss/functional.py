"""The public functions. Each has a dense twin of the same signature in :mod:`ltloss.reference`.

None of them stores the N×C logits (or C×C cosines), forwards or backwards. Statistics and losses are float32 (float64
for float64 inputs) whatever the dtype of features and prototypes; gradients come in the dtype of their tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ltloss import reference
from ltloss._deprecation import renamed_keywords
from ltloss._transforms import apply_of
from ltloss._types import NearestPrototype, Reduction, TopK
from ltloss._validation import (
    check_classes,
    check_features,
    check_k,
    check_lengths,
    check_number,
    check_offset,
    check_pair,
    check_prior,
    check_prototypes,
    check_same_device,
    check_scale,
    check_supervised,
    check_type,
)
from ltloss.class_balance import checked_counts
from ltloss.margins import BeyondPi, MarginGradient, Objective
from ltloss.numerics import compute_dtype
from ltloss.ops import prototype_search
from ltloss.ops._dispatch import at_hand, choose_backend
from ltloss.ops.labels import NOTHING, checked_labels
from ltloss.ops.logsumexp import Shard, Update, may_keep
from ltloss.ops.margin_cross_entropy import MarginCrossEntropy
from ltloss.ops.stats import logsumexp_stats
from ltloss.regularizers import FeatureNormKind, norm_penalty
from ltloss.runtime import current_debug

__all__ = [
    "cosine_logsumexp",
    "feature_norm_penalty",
    "margin_cross_entropy",
    "min_angle_regularizer",
    "nearest_prototype",
    "top_k",
]


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
    shard: Shard | None = None,
    update: Update | None = None,
) -> Tensor:
    r"""Softmax cross-entropy on cosine logits with a margin on the target class: the whole family in one function.

    With θ_c the angle between feature and prototype c, the target logit is
    s·(cos(m1·θ_y + m2_y) − m3_y) + log-prior_y and the others are s·cos θ_c + log-prior_c. With
    ``normalize_features=False, normalize_prototypes=False, scale=1`` it is that of a linear layer, x·w_c + b_c.

    Args:
        features: (N, D), any floating dtype, any length, any strides.
        prototypes: (C, D), likewise; its dtype may differ from that of ``features``. Or (C, K, D), K sub-centres a
            class, up to 8: a class's cosine is the largest of its K, and the gradient goes to that one, of equal ones
            to the first.
        labels: (N,) integers in [0, C), or ``ignore_index``.
        scale: s > 0, the inverse temperature. The modules take theirs from C: :func:`ltloss.default_scale`.
        angular_margin: m2 in radians, a number or (C,).
        cosine_margin: m3, a number or (C,).
        angle_multiplier: m1 > 0.
        log_prior: (C,), added to the logits in training (balanced softmax, logit adjustment); -inf takes a class
            without samples out. One that requires a gradient gets it: a prior that learns.
        class_weight: (C,), finite and >= 0, multiplies the loss of the samples of a class.
        label_smoothing: ε in [0, 1], (1−ε)(lse − z_y) + ε(lse − mean_c z_c).
        ignore_index: label of samples that neither count nor get a gradient.
        normalize_features: False keeps the feature's length: every cosine is multiplied by s·‖x‖ instead of s.
        normalize_prototypes: False keeps the prototypes' lengths: the logits are s·x̂·w_c, or s·x·w_c, and there is no
            margin, for there is no angle.
        bias: (C,), added to the logits as the prior is, with gradient.
        beyond_pi: where m1·θ + m2 exceeds π: ``"monotone"`` (−2 − cos(·)), ``"arcface"`` (cos θ − m2·sin m2),
            ``"cosine"`` (as it is), ``"clip"`` (π; a phase below 0 is 0); or ``"easy"``, no angular margin where
            cos θ <= 0.
        margin_gradient: ``"exact"``, or ``"straight_through"`` (d margin / d cos = 1).
        reduction: ``"mean"`` (divides by the summed weights of the counted samples), ``"sum"`` or ``"none"``.
        shard: a sample of the classes, which ``forward`` of a module got; None for all.
        update: the optimizer that moves the prototypes inside the backward (:mod:`ltloss.optim`); None gives them a
            gradient.

    Returns:
        A scalar, or (N,) for ``"none"``; float32, or float64 where an input is.

    Raises:
        ValueError, TypeError: arguments that do not fit together, or values out of range (those of tensors are looked
            at on the CPU only).
        IndexError: a label outside [0, C) that is not ``ignore_index``, with its position (on a GPU: only under
            ``ltloss.debug_labels``, and the sample's loss is NaN otherwise).

    Sources: Wang et al., NormFace, ACM MM 2017; CosFace, CVPR 2018; Deng et al., ArcFace, CVPR 2019; Deng et al.,
    Sub-center ArcFace, ECCV 2020; Cao et al., LDAM, NeurIPS 2019; Menon et al., Logit adjustment, ICLR 2021; Ren et
    al., NeurIPS 2020.

    Example:
        >>> import torch
        >>> from ltloss.functional import margin_cross_entropy
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
        >>> w = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
        >>> margin_cross_entropy(x, w, torch.tensor([0, 1]), scale=2.0, angular_margin=0.5)
        tensor(0.2381)
    """
    check_supervised(features, prototypes, labels)
    check_lengths(prototypes, normalize_prototypes)
    classes = prototypes.shape[0]
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
    ).checked(classes, features.new_empty(0, dtype=compute_dtype(features, prototypes)))
    check_prior(objective.log_prior, labels, ignore_index)
    prototypes, shard = at_hand(prototypes if update is None else update.reads(prototypes), shard)
    backend = choose_backend(features, prototypes, sharded=shard is not None, updated=update is not None)
    labels = checked_labels(labels, classes, ignore_index, "labels")
    if backend == "reference":
        return reference.loss_of(features, prototypes, labels, objective)
    prior, objective = objective.log_prior, objective._replace(log_prior=None)
    given = features, prototypes, prior, labels, objective, classes, backend, may_keep(), shard
    if update is None:
        return apply_of(MarginCrossEntropy)(*given)  # type: ignore[no-any-return]
    return update.run(MarginCrossEntropy, *given)  # type: ignore[no-any-return]


def cosine_logsumexp(
    features: Tensor, prototypes: Tensor, labels: Tensor, *, scale: float, log_prior: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The two numbers per sample that every loss of the family is made of, in one pass over the prototypes.

    Args:
        features: (N, D).
        prototypes: (C, D).
        labels: (N,) integers. A label outside [0, C) means "the target is not among these prototypes": nothing is
            left out of the log-sum-exp and the target logit is 0. That is what a shard of the classes needs.
        scale: s > 0.
        log_prior: (C,) or None.

    Returns:
        ``(logsumexp, target_logit)``, both (N,): r_i = log Σ_{c≠y_i} exp(l_ic), which is −inf where there is no
        other class, and t_i = l_{i,y_i}, with l_ic = s·cos_ic + log-prior_c. Both are differentiable, with any
        upstream gradient.

    Raises:
        ValueError, TypeError: arguments that do not fit together, a scale that is not positive, a prior out of range.

    Example:
        >>> import torch
        >>> from ltloss.functional import cosine_logsumexp
        >>> cosine_logsumexp(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), scale=4.0)
        (tensor([0., 0.]), tensor([4., 4.]))
    """
    check_supervised(features, prototypes, labels)
    scale = check_scale(scale)
    like = features.new_empty(0, dtype=compute_dtype(features, prototypes))
    log_prior = check_offset(log_prior, None, prototypes.shape[0], like)
    labels = labels.to(torch.int64)
    inside = (labels >= 0) & (labels < prototypes.shape[0])
    prototypes, shard = at_hand(prototypes)
    objective = Objective(log_prior=log_prior, scale=scale, ignore_index=None)
    other, target, _ = logsumexp_stats(features, prototypes, labels, objective, False, shard)
    if log_prior is not None:
        target = target + torch.where(inside, log_prior[torch.where(inside, labels, 0)], 0.0)
    return other, target


@renamed_keywords(rows="classes", exact="not allow_tf32")
def nearest_prototype(
    prototypes: Tensor, classes: Tensor | None = None, *, allow_tf32: bool = True
) -> NearestPrototype:
    """For every prototype, the largest cosine to any other prototype and its index, without the C×C matrix.

    Args:
        prototypes: (C, D); or (C, K, D), where the nearest of the sub-centres of two classes count.
        classes: (R,) class indices to answer for (each is compared with all C), or None for all; then each unordered
            pair is computed once.
        allow_tf32: False searches float32 prototypes with float32 products, even where
            ``torch.set_float32_matmul_precision`` allows TF32. Half precision is not affected: its products are exact.

    Returns:
        ``NearestPrototype(cosine, index)``, (C,) or (R,) each. Of several nearest the lowest index wins. With C = 1:
        −1 and −1. The gradient of ``cosine`` flows along each found pair only, to both of its ends. How near the found
        one is to the nearest: "The search" in ``docs/mathematics.md``.

    Raises:
        ValueError, TypeError: prototypes of another shape or dtype, classes that are no integers.
        IndexError: a class outside [0, C), with its position (on a GPU only under ``ltloss.debug_labels``).

    Example:
        >>> import torch
        >>> from ltloss.functional import nearest_prototype
        >>> nearest_prototype(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])).index
        tensor([2, 0, 0])
    """
    check_prototypes(prototypes)
    if classes is not None:
        classes = _checked_classes(classes, prototypes)
    check_type("allow_tf32", allow_tf32, bool)
    return prototype_search.nearest_prototype(prototypes, classes, allow_tf32)


def _checked_classes(classes: Tensor, prototypes: Tensor) -> Tensor:
    check_classes(classes, prototypes)
    return checked_labels(classes, prototypes.shape[0], NOTHING, "classes").to(torch.int64)


@renamed_keywords(power="count_exponent", rows="classes", exact="not allow_tf32")
def min_angle_regularizer(
    prototypes: Tensor,
    class_counts: Tensor | None = None,
    *,
    count_exponent: float = 0.25,
    classes: Tensor | None = None,
    allow_tf32: bool = True,
) -> Tensor:
    """Minus the weighted mean angle from each prototype to its nearest other one: pushed down, it spreads them.

    L = −Σ_i ω_i · min_{j≠i} arccos(ŵ_i·ŵ_j) with ω_i ∝ n_i^(−count_exponent), Σ ω = 1, so rare classes are
    pushed apart most.

    Args:
        prototypes: (C, D).
        class_counts: (C,) training samples per class, all > 0; None weights all classes alike (the MMA regulariser).
        count_exponent: 1/k of source A; 0.25 there.
        classes: (R,) class indices to take the mean over (for instance the classes of the batch), or None for all. The
            weights then sum to 1 over those.
        allow_tf32: as in :func:`nearest_prototype`.

    Returns:
        A scalar in [−π, 0], radians; 0 for a single class. The gradient stays finite where two prototypes coincide.

    Raises:
        ValueError, TypeError: prototypes, counts or classes of another shape or dtype, a count that is not positive.
        IndexError: a class outside [0, C), with its position (on a GPU only under ``ltloss.debug_labels``).

    Sources: source A's L2; uniform weights: Wang et al., MMA regularization, NeurIPS 2020.

    Example:
        >>> import torch
        >>> from ltloss.functional import min_angle_regularizer
        >>> min_angle_regularizer(torch.eye(3))  # all at right angles
        tensor(-1.5708)
    """
    check_prototypes(prototypes)
    count_exponent = check_number("count_exponent", count_exponent, at_least=0.0)
    check_type("allow_tf32", allow_tf32, bool)
    if class_counts is not None:
        class_counts = _checked_counts(class_counts, prototypes)
    if classes is not None:
        classes = _checked_classes(classes, prototypes)
    return prototype_search.min_angle(prototypes, class_counts, count_exponent, classes, allow_tf32)


def _checked_counts(class_counts: Tensor, prototypes: Tensor) -> Tensor:
    if not isinstance(class_counts, Tensor) or class_counts.shape != prototypes.shape[:1]:
        given = tuple(class_counts.shape) if isinstance(class_counts, Tensor) else type(class_counts).__name__
        raise ValueError(f"class_counts must be a tensor of shape ({prototypes.shape[0]},); got {given}")
    check_same_device(prototypes=prototypes, class_counts=class_counts)
    if not torch.compiler.is_compiling() and (class_counts.device.type == "cpu" or current_debug()):
        checked_counts(class_counts)  # looks at the values, which would synchronise a GPU with the host
    return class_counts


def feature_norm_penalty(
    features: Tensor,
    kind: FeatureNormKind | Callable[[Tensor], Tensor] = "ring",
    *,
    radius: float = 10.0,
) -> Tensor:
    """L3 of source A: the mean over the batch of g(‖x_i‖), a function that rewards features with length.

    Args:
        features: (N, D).
        kind: ``"inverse"`` 1/r; ``"magface"`` 1/r + r/u²; ``"ring"`` (r − R)²; ``"hinge"`` max(0, R − r);
            ``"neglog"`` −log r; or any function of the lengths (N,) that returns (N,).
        radius: the R of ``ring`` and ``hinge``, the u of ``magface`` (where g is smallest), in units of length.

    Returns:
        A scalar; 0 for an empty batch. A zero feature has the value of the shortest length told apart from zero (1e-6)
        and a zero gradient.

    Raises:
        ValueError, TypeError: features of another shape or dtype, an unknown kind, a radius that is not positive.

    Sources: source A's L3 leaves g open; Meng et al., MagFace, CVPR 2021; Zheng et al., Ring loss, CVPR 2018.

    Example:
        >>> import torch
        >>> from ltloss.functional import feature_norm_penalty
        >>> feature_norm_penalty(torch.tensor([[3.0, 4.0]]), kind="ring", radius=4.0)
        tensor(1.)
    """
    check_features(features)
    radius = check_number("radius", radius, above=0.0)
    return norm_penalty(features, kind, radius)


def top_k(
    features: Tensor,
    prototypes: Tensor,
    k: int = 1,
    *,
    normalize_prototypes: bool = True,
    bias: Tensor | None = None,
) -> TopK:
    """The k classes nearest in angle to each feature, without N×C: prediction, and the search for hard negatives.

    Args:
        features: (N, D).
        prototypes: (C, D); or (C, K, D), where the nearest sub-centre of a class counts.
        k: between 1 and C.
        normalize_prototypes: False takes the k classes with the largest x·w_c + b_c, by blocks in PyTorch on every
            device.
        bias: (C,), for ``normalize_prototypes=False``.

    Returns:
        ``TopK(cosine, index)``, (N, k) each, best first; what is equal in class order. Not differentiable.

    Raises:
        ValueError, TypeError: tensors that do not fit together, a k outside [1, C], a bias beside cosines.

    Example:
        >>> import torch
        >>> from ltloss.functional import top_k
        >>> top_k(torch.tensor([[0.0, 2.0]]), torch.eye(3, 2), k=2).index
        tensor([[1, 0]])
    """
    check_pair(features, prototypes)
    check_k(k, prototypes.shape[0])
    check_lengths(prototypes, normalize_prototypes)
    if normalize_prototypes:
        if bias is not None:
            raise ValueError("bias needs normalize_prototypes=False; got True, and cosines without a scale")
        return prototype_search.top_k(features, prototypes, k)
    like = features.new_empty(0, dtype=compute_dtype(features, prototypes))
    bias = check_offset(None, bias, prototypes.shape[0], like)
    return prototype_search.top_k_of_products(features, prototypes, k, bias)
