"""The extension interface: one pass over the prototypes, then any function of two numbers per sample.

Every loss of this package is a function of r_i = log Σ_{c≠y} exp(l_ic) and the target logit. :func:`logsumexp_stats`
computes both without the N×C logits, on every backend. The rest is ordinary PyTorch on vectors (N,), which autograd
differentiates: :func:`margin_losses` makes a loss per sample, again for each further margin; :func:`focal_losses` or
:func:`poly1_losses` may transform it; :func:`reduce_losses` weights and averages. Your code may replace any.
Under ``ltloss.use_backend("reference")`` the result is differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ltloss._types import Reduction
from ltloss._validation import (
    check_choice,
    check_dense,
    check_lengths,
    check_no_margin,
    check_number,
    check_offset,
    check_prior,
    check_scale,
    check_scales,
    check_supervised,
    check_type,
    plain_number,
    shown,
)
from ltloss.margins import Margin, Objective, margin_cosine
from ltloss.numerics import compute_dtype, log_sum_of_others
from ltloss.ops import stats as ops
from ltloss.ops._dispatch import at_hand
from ltloss.ops.labels import checked_labels, each_once
from ltloss.ops.protocols import Shard, Update
from ltloss.reference import direction

__all__ = [
    "Bend",
    "LogSumExpStats",
    "focal_losses",
    "logsumexp_stats",
    "margin_losses",
    "poly1_losses",
    "reduce_losses",
]


class Bend(NamedTuple):
    """A map of the cosines of other classes: cos_c becomes p0 + p1·cos_c + p2·cos_c² where cos_c > threshold.

    Attributes:
        threshold: (N,), a cosine per sample, without gradient.
        p0, p1, p2: numbers or 0-d tensors, without gradient. -inf, 0 and 0 remove the class from the softmax.

    See also: :func:`logsumexp_stats`, whose ``bend`` returns it; :class:`ltloss.CurricularFaceLoss`, which uses it.

    Example:
        >>> import torch
        >>> from ltloss.extend import Bend, logsumexp_stats
        >>> x, w = torch.eye(2), torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> def nearer_than_half(target_cosine, labels):
        ...     return Bend(torch.full_like(target_cosine, 0.5), p0=-torch.inf)
        >>> logsumexp_stats(x, w, torch.tensor([0, 2]), scale=4.0, bend=nearer_than_half).logsumexp
        tensor([0., 0.])
    """

    threshold: Tensor
    p0: Tensor | float = 0.0
    p1: Tensor | float = 0.0
    p2: Tensor | float = 0.0

    def of_logits(self, scale: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the threshold (N,) and the polynomial (3,) for logits s·cos instead of cosines."""
        given = self.p0 * scale, self.p1, self.p2 / scale
        # Numbers are filled in on the device, because a copy to it would make the host wait.
        polynomial = [p.detach().to(like) if isinstance(p, Tensor) else like.new_full((), p) for p in given]
        return self.threshold.detach().to(like) * scale, torch.stack(polynomial)


class LogSumExpStats(NamedTuple):
    """The result of a pass over the prototypes, per sample. With k labels per sample, (N, k) replaces (N,) as noted.

    Attributes:
        labels: (N,) or (N, k) int64, -1 for samples that do not count. A class-parallel batch is padded with such
            samples: a mean of your own must leave them out, as :func:`reduce_losses` does.
        logsumexp: (N,) r, over all classes but the target, or but the k targets; -inf where there is no other class.
        target_logit: (N,) or (N, k), s·cos_y without the prior.
        logit_scale: the factor of the cosine (or of x·w, x̂·w): s, or (N,) s·‖x‖ or s_i.
        target_prior: (N,) or (N, k), the log prior of the target; 0 without a prior.
        logit_sum: (N,) Σ_c l_c over all classes, prior included, if it was requested; else None.
        num_classes: C.
        normalize_prototypes: whether the logits are cosines, so that a margin is possible.

    See also: :func:`logsumexp_stats`, which returns it; :func:`margin_losses`, which takes it.
    """

    labels: Tensor
    logsumexp: Tensor
    target_logit: Tensor
    logit_scale: Tensor | float
    target_prior: Tensor | float
    logit_sum: Tensor | None
    num_classes: int
    normalize_prototypes: bool = True


def logsumexp_stats(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor,
    log_prior: Tensor | None = None,
    normalize_features: bool = True,
    normalize_prototypes: bool = True,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    with_logit_sum: bool = False,
    bend: Callable[[Tensor, Tensor], Bend] | None = None,
    shard: Shard | None = None,
    update: Update | None = None,
) -> LogSumExpStats:
    """Compute r_i = log Σ_{c≠y_i} exp(l_ic) and the target logit of every sample, in one pass over the prototypes.

    The logits are l_ic = s·cos_ic + log-prior_c. Both results are differentiable.

    Args:
        features: (N, D).
        prototypes: (C, D), or (C, K, D) with K sub-centres a class.
        labels: (N,) integers in [0, C), or ``ignore_index``. Or (N, k), k ≤ 8: a sample is ignored if its first label
            is ``ignore_index``; later labels that are ``ignore_index``, or that repeat a class, are dropped.
        scale: s > 0; or a tensor with gradient: 0-d for a learnable scale, (N,) for a scale per sample.
        normalize_features: False multiplies the cosines by ‖x‖. It must be True if ``scale`` is a tensor.
        log_prior, normalize_prototypes, bias, ignore_index: as in :func:`ltloss.functional.margin_cross_entropy`.
        with_logit_sum: also compute Σ_c l_c, which label smoothing needs.
        bend: maps the target cosines (N,), without gradient, and the labels (N,), -1 if ignored, to a :class:`Bend`. It
            needs a number as ``scale``, normalised features and prototypes, one label each, no ``with_logit_sum``.
        shard: the classes that were drawn, as ``forward`` of a sampled module receives them. None: all classes.
        update: ``self.fused_update`` of a module, for the optimizers of :mod:`ltloss.optim`. None: a gradient.

    Returns:
        :class:`LogSumExpStats`; float32, or float64 if an input is float64.

    Raises:
        ValueError, TypeError, IndexError: arguments that do not fit together, values or labels out of range.

    See also: :func:`margin_losses`; :func:`ltloss.functional.cosine_logsumexp`, the two numbers with fewer options.

    Example:
        >>> import torch
        >>> from ltloss.extend import logsumexp_stats
        >>> stats = logsumexp_stats(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), scale=4.0)
        >>> stats.logsumexp, stats.target_logit
        (tensor([0., 0.]), tensor([4., 4.]))
    """
    check_supervised(features, prototypes, labels, several=True)
    ignore_index = check_type("ignore_index", ignore_index, int)
    check_type("normalize_features", normalize_features, bool)
    check_type("with_logit_sum", with_logit_sum, bool)
    check_lengths(prototypes, normalize_prototypes)
    num_classes, dtype = prototypes.shape[0], compute_dtype(features, prototypes)
    log_prior = check_offset(log_prior, bias, num_classes, features.new_empty(0, dtype=dtype))
    labels = checked_labels(labels, num_classes, ignore_index, "labels")
    labels = labels if labels.dim() == 1 else each_once(labels, ignore_index)
    check_prior(log_prior, labels, ignore_index)
    each_counted = labels != ignore_index
    counted = each_counted if labels.dim() == 1 else each_counted[:, 0]
    here, shard = at_hand(prototypes if update is None else update.reads(prototypes), shard)
    logit_scale: Tensor | float
    scale = plain_number(scale, wait=bend is not None or not normalize_features)
    if isinstance(scale, Tensor):
        logit_scale = scale = check_scales(scale, counted, features, normalize_features).to(dtype)
        in_pass = scale if shard is None else shard.sum_gradients(scale)
        features = direction(features.masked_fill(~counted[:, None], 0.0).to(dtype)) * in_pass[:, None]
        objective = Objective(scale=1.0, normalize_features=False)
    else:
        logit_scale = scale = check_scale(scale)
        objective = Objective(scale=scale, normalize_features=normalize_features)
        if normalize_prototypes and not normalize_features:
            counted_features = features.masked_fill(~counted[:, None], 0.0)
            logit_scale = scale * torch.linalg.vector_norm(counted_features, dim=1, dtype=dtype)
    objective = objective._replace(
        log_prior=log_prior, ignore_index=ignore_index, normalize_prototypes=normalize_prototypes
    )
    counting = torch.where(each_counted, labels, -1)
    bent = ops.NO_BEND
    if bend is not None:
        alone = not (isinstance(scale, Tensor) or with_logit_sum or labels.dim() > 1)
        if not (callable(bend) and alone and all(objective.normalize)):
            raise ValueError(
                "bend must be a function, with a number as scale, normalised features and prototypes, one label per "
                f"sample, no label smoothing (with_logit_sum=False); got {type(bend).__name__}, labels {shown(labels)},"
                f" {type(scale).__name__} as scale, {normalize_features=}, {normalize_prototypes=}, {with_logit_sum=}"
            )
        cosine = ops.target_cosines(features, here, counting, shard)
        given = bend(cosine, counting)
        threshold = given.threshold if isinstance(given, Bend) else given
        if not isinstance(given, Bend) or threshold.shape != cosine.shape:
            raise ValueError(f"bend must return a Bend with a threshold {shown(cosine)}; got {shown(threshold)}")
        bent = given.of_logits(objective.scale, cosine)
    r, target, logit_sum = ops.logsumexp_stats(features, here, labels, objective, with_logit_sum, shard, update, bent)
    if logit_sum is not None and log_prior is not None:
        logit_sum = logit_sum + log_prior.sum()
    target_prior = 0.0 if log_prior is None else log_prior[counting.clamp(0, num_classes - 1)]
    return LogSumExpStats(counting, r, target, logit_scale, target_prior, logit_sum, num_classes, normalize_prototypes)


def _added(name: str, per_sample: Tensor | None, margin: Tensor | float, stats: LogSumExpStats) -> Tensor | float:
    """Add a margin per sample (N,) to the margin. It has a keyword of its own, so that N = C is not ambiguous."""
    if per_sample is None:
        return margin
    if not isinstance(per_sample, Tensor) or per_sample.shape != stats.labels.shape:
        raise ValueError(f"{name} must be a tensor {shown(stats.labels)}, one per sample; got {shown(per_sample)}")
    check_dense(name, per_sample)
    return margin + per_sample.to(stats.logsumexp.dtype)


def margin_losses(
    stats: LogSumExpStats,
    *,
    sample_angular_margin: Tensor | None = None,
    sample_cosine_margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    **margin: Any,
) -> Tensor:
    """Cross-entropy of each sample with a margin on the target cosine.

    With z = scale·margin(cos_y) + prior_y the loss is log(e^r + e^z) − z = softplus(r − z), without cancellation.

    Args:
        stats: the result of :func:`logsumexp_stats`.
        sample_angular_margin, sample_cosine_margin: (N,), radians and cosine units, added to the margins below. They
            get a gradient if they require one.
        label_smoothing: as in :func:`ltloss.functional.margin_cross_entropy`. It needs ``with_logit_sum=True``.
        margin: the fields of :class:`ltloss.margins.Margin` as keywords; its margins are numbers or (C,).

    Returns:
        (N,), or with k labels per sample (N, k), the loss of each; unweighted, 0 where a sample does not count.

    Raises:
        ValueError, TypeError: a margin out of range or of another shape, smoothing without ``with_logit_sum=True``.

    See also: :func:`reduce_losses`, which weights and averages them; :func:`focal_losses`; :func:`poly1_losses`.

    Example:
        >>> import torch
        >>> from ltloss.extend import logsumexp_stats, margin_losses
        >>> stats = logsumexp_stats(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), scale=4.0)
        >>> margin_losses(stats, cosine_margin=0.5)
        tensor([0.1269, 0.1269])
    """
    label_smoothing = check_number("label_smoothing", label_smoothing, at_least=0.0, at_most=1.0)
    of_classes = Margin(**margin).checked(stats.num_classes, stats.logsumexp)
    if not stats.normalize_prototypes:
        per_sample = {"sample_angular_margin": sample_angular_margin, "sample_cosine_margin": sample_cosine_margin}
        check_no_margin(
            of_classes.in_words() or next((name for name, one in per_sample.items() if one is not None), "")
        )
    if label_smoothing > 0.0 and stats.logit_sum is None:
        raise ValueError(
            f"label_smoothing={label_smoothing} needs the sum of all logits; call logsumexp_stats with "
            "with_logit_sum=True"
        )
    scale, several = stats.logit_scale, stats.labels.dim() == 2
    if several and isinstance(scale, Tensor):
        scale = scale[:, None].expand(stats.labels.shape)
    # A zero feature that keeps its length has logit 0 and scale 0; the bound turns 0/0 into 0.
    divisor = scale.clamp_min(torch.finfo(scale.dtype).tiny) if isinstance(scale, Tensor) else scale
    of_samples = of_classes.of_samples(stats.labels)
    of_samples = of_samples._replace(
        angular_margin=_added("sample_angular_margin", sample_angular_margin, of_samples.angular_margin, stats),
        cosine_margin=_added("sample_cosine_margin", sample_cosine_margin, of_samples.cosine_margin, stats),
    )
    flat = {name: one.flatten() if isinstance(one, Tensor) else one for name, one in of_samples._asdict().items()}
    cosine = margin_cosine((stats.target_logit / divisor).flatten(), **flat).view(stats.labels.shape)
    target_with_margin = scale * cosine
    z, others = target_with_margin + stats.target_prior, stats.logsumexp
    if several:
        plain = stats.target_logit + stats.target_prior
        others = log_sum_of_others(others, plain.masked_fill(stats.labels < 0, -torch.inf))
    losses = -F.logsigmoid(z - others)
    if stats.logit_sum is not None and label_smoothing > 0.0:
        # (1-e)(lse - z) + e(lse - mean z) with lse = loss + z; the target enters the mean with its margin.
        whole = stats.logit_sum[:, None] if several else stats.logit_sum
        mean = (whole - stats.target_logit + target_with_margin) / stats.num_classes
        losses = losses + label_smoothing * (z - mean)
    return losses.masked_fill(stats.labels < 0, 0.0)


def focal_losses(losses: Tensor, gamma: float = 2.0) -> Tensor:
    """Focal transform of losses ℓ = −log p: (1 − p)^γ·ℓ. Samples that are classified well count less.

    Args:
        losses: (N,), not negative, as :func:`margin_losses` gives them.
        gamma: γ >= 0; 0 leaves the losses as they are.

    Returns:
        (N,). The slope at ℓ = 0, where p = 1, is 0 for every γ > 0, even for γ < 1.

    Raises:
        TypeError, ValueError: a γ that is not a number or negative.

    See also: :func:`poly1_losses`.

    Source: Lin et al., Focal loss, ICCV 2017, eq. 4.

    Example:
        >>> import torch
        >>> from ltloss.extend import focal_losses
        >>> focal_losses(torch.tensor([0.0, 1.0, 5.0]))
        tensor([0.0000, 0.3996, 4.9328])
    """
    gamma = check_number("gamma", gamma, at_least=0.0)
    # For tiny ℓ, 1 − p = ℓ to the last bit, so ℓ^(1+γ) is taken: ℓ^γ alone has no finite slope for γ < 1.
    tiny = losses < torch.finfo(losses.dtype).eps
    large = torch.where(tiny, 1.0, losses)
    return torch.where(tiny, torch.where(tiny, losses, 0.0) ** (1.0 + gamma), (-torch.expm1(-large)) ** gamma * large)


def poly1_losses(losses: Tensor, epsilon: float = 1.0) -> Tensor:
    """Poly-1 transform of losses ℓ = −log p: ℓ + ε·(1 − p). The first term of ℓ's series in 1 − p gets weight 1 + ε.

    Args:
        losses: (N,), as :func:`margin_losses` gives them.
        epsilon: ε >= −1; 0 leaves the losses as they are.

    Returns:
        (N,).

    Raises:
        TypeError, ValueError: an ε that is not a number or below −1.

    See also: :func:`focal_losses`.

    Source: Leng et al., PolyLoss, ICLR 2022, eq. 5.

    Example:
        >>> import torch
        >>> from ltloss.extend import poly1_losses
        >>> poly1_losses(torch.tensor([0.0, 0.1, 5.0]))
        tensor([0.0000, 0.1952, 5.9933])
    """
    return losses - check_number("epsilon", epsilon, at_least=-1.0) * torch.expm1(-losses)


def reduce_losses(
    losses: Tensor,
    labels: Tensor,
    *,
    class_weight: Tensor | float | None = None,
    sample_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Weight losses ℓ_i and reduce them. ``mean`` is Σ w_i·ℓ_i / Σ w_i over the samples that count.

    Args:
        losses: (N,), or (N, k) with k labels per sample.
        labels: same shape, -1 for samples that do not count, as in ``stats.labels``.
        class_weight: (C,) weight of each class, a number for all, or None.
        sample_weight: same shape as the losses, or None. It multiplies the class weight.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or (N,) for ``"none"``. A mean over no sample is 0 with zero gradients.

    Raises:
        ValueError, IndexError: an unknown reduction, weights of another shape.

    See also: :func:`margin_losses`, which makes the losses.

    Example:
        >>> import torch
        >>> from ltloss.extend import reduce_losses
        >>> reduce_losses(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([0, 1, -1]))
        tensor(2.)
    """
    check_choice("reduction", reduction, get_args(Reduction))
    for name, one in (("labels", labels), ("sample_weight", sample_weight)):
        if one is not None and one.shape != losses.shape:
            raise ValueError(f"{name} must have the shape of losses, {shown(losses)}; got {shown(one)}")
    counted = labels >= 0
    weights = counted.to(losses.dtype)
    if isinstance(class_weight, Tensor) and class_weight.dim():
        labels = checked_labels(labels.where(counted, -1), class_weight.shape[0], -1, "labels")  # or C reads the last
        class_weight = class_weight[labels.clamp(0, class_weight.shape[0] - 1)]
    for factor in (weight for weight in (class_weight, sample_weight) if weight is not None):
        weights = weights * (factor.to(losses.dtype) if isinstance(factor, Tensor) else factor)
    weighted = torch.where(counted, losses, 0.0) * weights
    if reduction == "none":
        return weighted if weighted.dim() == 1 else weighted.sum(1)
    if reduction == "sum":
        return weighted.sum()
    total = weights.sum()
    return weighted.sum() / torch.where(total == 0, 1.0, total)
