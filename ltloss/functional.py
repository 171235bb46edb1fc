"""The losses and searches as functions. Each has a dense twin of the same signature in :mod:`ltloss.reference`.

No function stores the N×C logits or the C×C cosines, neither forward nor backward. Statistics and losses are float32,
or float64 if an input is float64. Each gradient has the dtype of its tensor.
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
    check_count,
    check_features,
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
    shown,
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

    Let θ_c be the angle between the feature and prototype c. The target logit is
    s·(cos(m1·θ_y + m2_y) − m3_y) + log-prior_y. The other logits are s·cos θ_c + log-prior_c. With
    ``normalize_features=False, normalize_prototypes=False, scale=1`` they are those of a linear layer, x·w_c + b_c.

    Args:
        features: (N, D), any floating dtype, any length, any strides.
        prototypes: (C, D), likewise. The dtype may differ from that of ``features``. Or (C, K, D) with K ≤ 8
            sub-centres a class: the cosine of a class is the largest of its K. The gradient goes to that sub-centre
            alone, to the first of equal ones.
        labels: (N,) integers in [0, C), or ``ignore_index``.
        scale: s > 0, the inverse temperature. The modules derive theirs from C: :func:`ltloss.default_scale`.
        angular_margin: m2 in radians, a number or (C,).
        cosine_margin: m3 in [-2, 2], a number or (C,).
        angle_multiplier: m1 > 0.
        log_prior: (C,), added to the training logits (balanced softmax, logit adjustment). -inf removes a class
            without samples. A tensor that requires a gradient gets one.
        class_weight: (C,), finite and >= 0, the factor on the loss of each class's samples.
        label_smoothing: ε in [0, 1]. The loss is (1−ε)·(lse − z_y) + ε·(lse − mean_c z_c), with z the logits and lse
            their log-sum-exp.
        ignore_index: label of samples that are left out of the loss and get no gradient.
        normalize_features: False keeps the length of the features: every cosine is multiplied by s·‖x‖ instead of s.
        normalize_prototypes: False keeps the lengths of the prototypes: the logits are s·x̂·w_c or, with
            ``normalize_features=False``, s·x·w_c. No margin is allowed then, because there is no angle.
        bias: (C,), added to the logits as the prior is, with gradient.
        beyond_pi: what replaces cos(m1·θ + m2) where m1·θ + m2 exceeds π: ``"monotone"``: −2 − cos(m1·θ + m2);
            ``"arcface"``: cos θ − m2·sin m2; ``"cosine"``: nothing does; ``"clip"``: −1 (and 1 where m1·θ + m2 < 0).
            ``"easy"`` drops the angular margin where cos θ <= 0.
        margin_gradient: ``"exact"``, or ``"straight_through"``, which takes the derivative of the margin by cos θ as 1.
        reduction: ``"mean"`` (divides by the summed weights of the counted samples), ``"sum"`` or ``"none"``.
        shard: the classes that were drawn, as ``forward`` of a sampled module receives them. None: all classes.
        update: the optimizer of :mod:`ltloss.optim` that updates the prototypes inside the backward pass. None: the
            prototypes get a gradient.

    Returns:
        A scalar, or (N,) for ``"none"``; float32, or float64 if an input is float64.

    Raises:
        ValueError, TypeError: arguments that do not fit together, or values out of range. The values of tensors are
            checked on the CPU only.
        IndexError: a label outside [0, C) that is not ``ignore_index``, with its position. On a GPU only under
            ``ltloss.debug_labels``; otherwise the loss of that sample is NaN.

    See also: :class:`ltloss.CombinedMarginLoss`, the module that holds the prototypes;
    :func:`ltloss.soft_labels.soft_label_cross_entropy` for several labels per sample;
    :func:`ltloss.extend.logsumexp_stats` for a loss of your own.

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
    prototypes, shard = at_hand(prototypes if update is None else update.reads(prototypes), shard)
    backend = choose_backend(features, prototypes, sharded=shard is not None, updated=update is not None)
    labels = checked_labels(labels, classes, ignore_index, "labels")
    check_prior(objective.log_prior, labels, ignore_index)
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
    """Compute the two numbers per sample that determine every loss of the family, in one pass over the prototypes.

    With l_ic = s·cos_ic + log-prior_c these are r_i = log Σ_{c≠y_i} exp(l_ic) and t_i = l_{i,y_i}.

    Args:
        features: (N, D).
        prototypes: (C, D), or (C, K, D) with K sub-centres a class.
        labels: (N,) integers. A label outside [0, C) means that the target is not among these prototypes: the
            log-sum-exp then covers all of them, and the target logit is 0. A part of the classes needs this.
        scale: s > 0.
        log_prior: (C,), or None.

    Returns:
        ``(logsumexp, target_logit)``: r and t, both (N,) and both differentiable. r is −inf where there is no other
        class.

    Raises:
        ValueError, TypeError: arguments that do not fit together, a scale that is not positive, a prior out of range.

    See also: :func:`ltloss.extend.logsumexp_stats`, which takes more options and is what losses build on;
    :func:`margin_cross_entropy`, the loss of these numbers.

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
    """Find for every prototype the nearest other one, max_{j≠i} ŵ_i·ŵ_j, without the C×C matrix.

    Args:
        prototypes: (C, D); or (C, K, D), where the cosine of two classes is the largest between their sub-centres.
        classes: (R,) indices of the classes to search for. Each is compared with all C. None: all classes; each
            unordered pair is then computed once.
        allow_tf32: False searches float32 prototypes with float32 products, even where
            ``torch.set_float32_matmul_precision`` allows TF32. Half precision is not affected: its products are exact.

    Returns:
        ``NearestPrototype(cosine, index)``, (C,) or (R,) each. The lowest of equally near indices wins. With C = 1
        both are −1. The gradient of ``cosine`` flows to the two prototypes of each pair found, and to no other. The
        section "The search" of ``docs/mathematics.md`` says how much the result may differ from the exact nearest.

    Raises:
        ValueError, TypeError: prototypes of another shape or dtype, classes that are not integers.
        IndexError: a class outside [0, C), with its position. On a GPU only under ``ltloss.debug_labels``.

    See also: :func:`top_k`, the prototypes nearest to a feature; :func:`min_angle_regularizer`, the loss of these
    cosines.

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
    return checked_labels(classes, prototypes.shape[0], NOTHING, "classes")


@renamed_keywords(power="count_exponent", rows="classes", exact="not allow_tf32")
def min_angle_regularizer(
    prototypes: Tensor,
    class_counts: Tensor | None = None,
    *,
    count_exponent: float = 0.25,
    classes: Tensor | None = None,
    allow_tf32: bool = True,
) -> Tensor:
    """Minus the weighted mean angle from each prototype to the nearest other one. Minimising it spreads the prototypes.

    L = −Σ_i ω_i · min_{j≠i} arccos(ŵ_i·ŵ_j) with ω_i ∝ n_i^(−count_exponent) and Σ ω = 1: rare classes are
    pushed apart most.

    Args:
        prototypes: (C, D), or (C, K, D) as in :func:`nearest_prototype`.
        class_counts: (C,) training samples per class, all > 0. None weights all classes alike (the MMA regulariser).
        count_exponent: 1/k of source A, where it is 0.25.
        classes: (R,) indices of the classes to average over, for instance those of the batch; the weights sum to 1
            over these. None: all classes.
        allow_tf32: as in :func:`nearest_prototype`.

    Returns:
        A scalar in [−π, 0], in radians; 0 for a single class. The gradient stays finite where two prototypes coincide.

    Raises:
        ValueError, TypeError: prototypes, counts or classes of another shape or dtype, a count that is not positive.
        IndexError: a class outside [0, C), with its position. On a GPU only under ``ltloss.debug_labels``.

    See also: :class:`ltloss.LongTailLoss`, which adds this term to its loss.

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
        raise ValueError(f"class_counts must be a tensor of shape ({prototypes.shape[0]},); got {shown(class_counts)}")
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
    """L3 of source A: the batch mean of g(‖x_i‖), a penalty on short features.

    Args:
        features: (N, D).
        kind: ``"inverse"`` 1/r; ``"magface"`` 1/r + r/u²; ``"ring"`` (r − R)²; ``"hinge"`` max(0, R − r);
            ``"neglog"`` −log r; or any function that maps the lengths (N,) to values (N,).
        radius: R of ``ring`` and ``hinge``, u of ``magface`` (where g is smallest), in units of length.

    Returns:
        A scalar; 0 for an empty batch. Lengths below 1e-6 count as 1e-6, so a zero feature has a finite value and a
        zero gradient.

    Raises:
        ValueError, TypeError: features of another shape or dtype, an unknown kind, a radius that is not positive.

    See also: :class:`ltloss.LongTailLoss`, which adds this term to its loss.

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
    """Find the k classes with the largest cosine to each feature, without the N×C matrix.

    It serves prediction and the search for hard negatives.

    Args:
        features: (N, D).
        prototypes: (C, D); or (C, K, D), where the nearest sub-centre of a class counts.
        k: between 1 and C.
        normalize_prototypes: False ranks by x·w_c + b_c instead of the cosine. This runs in PyTorch, block by block,
            on every device.
        bias: (C,), only with ``normalize_prototypes=False``.

    Returns:
        ``TopK(cosine, index)``, (N, k) each, largest first, equal ones in class order. Not differentiable.

    Raises:
        ValueError, TypeError: tensors that do not fit together, a k outside [1, C], a bias with cosines.

    See also: :meth:`ltloss.PrototypeHead.predict`, the same for a loss module; :func:`nearest_prototype`, the
    prototypes nearest to each other.

    Example:
        >>> import torch
        >>> from ltloss.functional import top_k
        >>> top_k(torch.tensor([[0.0, 2.0]]), torch.eye(3, 2), k=2).index
        tensor([[1, 0]])
    """
    check_pair(features, prototypes)
    k = check_count("k", k, prototypes.shape[0], "the number of classes ")
    check_lengths(prototypes, normalize_prototypes)
    if normalize_prototypes:
        if bias is not None:
            raise ValueError("bias needs normalize_prototypes=False: cosines have none; got normalize_prototypes=True")
        return prototype_search.top_k(features, prototypes, k)
    like = features.new_empty(0, dtype=compute_dtype(features, prototypes))
    bias = check_offset(None, bias, prototypes.shape[0], like)
    return prototype_search.top_k_of_products(features, prototypes, k, bias)
