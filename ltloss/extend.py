"""The extension interface: one pass over the prototypes, then any function of two numbers per sample.

Every loss here is a function of r_i = log Σ_{c≠y} exp(l_ic) and the target logit. :func:`logsumexp_stats` computes both
without N×C, forward and backward, on every backend; what follows is ordinary PyTorch on (N,) vectors, differentiated by
autograd. :func:`margin_losses` and :func:`reduce_losses` are the two steps that most losses want next; between them,
:func:`focal_losses` or :func:`poly1_losses` may bend the loss of a sample. Several margins may be put on one pass.
Under ``ltloss.use_backend("reference")`` everything is differentiable any number of times.
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
    check_lengths,
    check_no_margin,
    check_number,
    check_offset,
    check_prior,
    check_same_device,
    check_scale,
    check_supervised,
    check_type,
    plain_number,
)
from ltloss.margins import Margin, Objective, margin_cosine
from ltloss.numerics import compute_dtype
from ltloss.ops import stats as ops
from ltloss.ops._dispatch import at_hand
from ltloss.ops.labels import checked_labels
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
    """What becomes of the cosines of other classes beyond a threshold: cos -> p0 + p1·cos + p2·cos².

    Attributes:
        threshold: (N,), a cosine per sample; no gradient flows to it.
        p0, p1, p2: numbers or tensors (), without gradient. With p0 = -inf and p1 = p2 = 0 the class leaves the sum.

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
        """Threshold (N,) and polynomial (3,) for logits s·cos."""
        given = self.p0 * scale, self.p1, self.p2 / scale
        # A number is filled in on the device: copied there, it would make the host wait.
        polynomial = [p.detach().to(like) if isinstance(p, Tensor) else like.new_full((), p) for p in given]
        return self.threshold.detach().to(like) * scale, torch.stack(polynomial)


class LogSumExpStats(NamedTuple):
    """What a pass over the prototypes leaves of each sample.

    Attributes:
        labels: (N,) int64, -1 for samples that do not count. A class-parallel batch is padded with such samples, so a
            mean of your own must leave them out, as :func:`reduce_losses` does. With several labels a sample (N, k).
        logsumexp: (N,) r, over the classes without the target, or all targets; -inf where there is no other class.
        target_logit: (N,) s·cos_y, or (N, k), without the prior.
        logit_scale: what multiplies the cosine: s, or (N,) s·‖x‖ or s_i. Without cosines, what multiplies x·w or x̂·w.
        target_prior: (N,) or (N, k) the prior of the target, or 0.
        logit_sum: (N,) Σ_c l_c over all classes with the prior, if it was asked for, else None.
        num_classes: C.
        normalize_prototypes: whether there are cosines, for a margin to be put on.
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
    """One pass of features over prototypes: r_i and the target logit of every sample, both differentiable.

    Args:
        features: (N, D).
        prototypes: (C, D).
        labels: (N,) integers in [0, C), or ``ignore_index``; or (N, k), up to 8 classes a sample. The first says
            whether it counts; ``ignore_index`` behind it, or a class named before, is none.
        scale: s > 0; or a tensor with gradient, () for a scale that is learned, or (N,), a scale per sample.
        log_prior: (C,) added to the logits, or None.
        normalize_features: False multiplies the logits by ‖x‖; with a tensor as scale it must stay True.
        normalize_prototypes, bias: as in :func:`ltloss.functional.margin_cross_entropy`; the bias is part of the prior.
        ignore_index: label of samples that do not count.
        with_logit_sum: also Σ_c l_c, which label smoothing needs.
        bend: what becomes of the cosines of other classes, a function of the target cosines (N,), without gradient, and
            of the labels (N,), -1 for samples that do not count. For cosines with a number as scale, and without
            ``with_logit_sum``.
        shard: a sample of the classes, which ``forward`` of a module got; None for all.
        update: ``self.fused_update`` of a module, with which the optimizers of :mod:`ltloss.optim` move its prototypes
            inside the backward; None gives them a gradient.

    Raises:
        ValueError, TypeError, IndexError: arguments that do not fit together.

    Example:
        >>> import torch
        >>> from ltloss.extend import logsumexp_stats
        >>> stats = logsumexp_stats(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), scale=4.0)
        >>> stats.logsumexp, stats.target_logit
        (tensor([0., 0.]), tensor([4., 4.]))
    """
    check_supervised(features, prototypes, labels, several=True)
    check_type("ignore_index", ignore_index, int)
    check_type("normalize_features", normalize_features, bool)
    check_lengths(prototypes, normalize_prototypes)
    num_classes, dtype = prototypes.shape[0], compute_dtype(features, prototypes)
    log_prior = check_offset(log_prior, bias, num_classes, features.new_empty(0, dtype=dtype))
    check_prior(log_prior, labels, ignore_index)
    labels = checked_labels(labels, num_classes, ignore_index, "labels").to(torch.int64)
    labels = labels if labels.dim() == 1 else _each_once(labels, ignore_index)
    each_counted = labels != ignore_index
    counted = each_counted if labels.dim() == 1 else each_counted[:, 0]
    logit_scale: Tensor | float
    scale = plain_number(scale)
    if isinstance(scale, Tensor):
        check_same_device(features=features, scale=scale)
        scale = scale if scale.dim() else scale.expand(counted.shape)
        if scale.shape != counted.shape or not normalize_features:
            raise ValueError(
                "scale must be a number, or with normalize_features=True a tensor () or, for a scale per sample, "
                f"{tuple(counted.shape)}; got {tuple(scale.shape)} and normalize_features={normalize_features}"
            )
        logit_scale = scale.to(dtype)
        features = direction(features.masked_fill(~counted[:, None], 0.0).to(dtype)) * logit_scale[:, None]
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
    here, shard = at_hand(prototypes if update is None else update.reads(prototypes), shard)
    counting = torch.where(each_counted, labels, -1)
    bent = ops.NO_BEND
    if bend is not None:
        if isinstance(scale, Tensor) or with_logit_sum or labels.dim() > 1 or not all(objective.normalize):
            raise ValueError(
                "bend, a function of the other classes' cosines, needs a number as scale, normalised features and "
                "prototypes, one label a sample, and no sum of all logits, which label smoothing asks for; got "
                f"labels {tuple(labels.shape)}, {type(scale).__name__} as scale, {normalize_features=}, "
                f"{normalize_prototypes=} and {with_logit_sum=}"
            )
        cosine = ops.target_cosines(features, here, counting, shard)
        bent = bend(cosine, counting).of_logits(scale, cosine)
    r, target, logit_sum = ops.logsumexp_stats(features, here, labels, objective, with_logit_sum, shard, update, bent)
    labels = counting
    if logit_sum is not None and log_prior is not None:
        logit_sum = logit_sum + log_prior.sum()
    target_prior = 0.0 if log_prior is None else log_prior[labels.clamp(0, num_classes - 1)]
    return LogSumExpStats(labels, r, target, logit_scale, target_prior, logit_sum, num_classes, normalize_prototypes)


def _each_once(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels (N, k) without those of a sample that does not count, and without what was named before."""
    again = labels[:, :, None] == labels[:, None, :]
    again = again.tril(-1).any(2) | (labels[:, :1] == ignore_index)
    return labels.masked_fill(again, ignore_index)


def _log_sum_of_others(logsumexp: Tensor, logits: Tensor) -> Tensor:
    """r (N, k) of each target among all classes but itself, from r without any target (N,) and their logits (N, k)."""
    k = logits.shape[1]
    each = torch.cat([logits, logsumexp[:, None]], 1)[:, None].expand(-1, k, -1)
    each = each.masked_fill(torch.eye(k, k + 1, dtype=torch.bool, device=logits.device), -torch.inf)
    nothing = (each == -torch.inf).all(2)
    return torch.logsumexp(each.masked_fill(nothing[..., None], 0.0), 2).masked_fill(nothing, -torch.inf)


def _added(name: str, per_sample: Tensor | None, margin: Tensor | float, stats: LogSumExpStats) -> Tensor | float:
    """(C,) and (N,) come under names of their own and are never guessed apart."""
    if per_sample is None:
        return margin
    if not isinstance(per_sample, Tensor) or per_sample.shape != stats.labels.shape:
        shown = tuple(per_sample.shape) if isinstance(per_sample, Tensor) else type(per_sample).__name__
        raise ValueError(f"{name} must be a tensor {tuple(stats.labels.shape)}, one per sample; got {shown}")
    return margin + per_sample.to(stats.logsumexp.dtype)


def margin_losses(
    stats: LogSumExpStats,
    *,
    sample_angular_margin: Tensor | None = None,
    sample_cosine_margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    **margin: Any,
) -> Tensor:
    """Per-sample losses (N,), unweighted, 0 where a sample does not count; with several labels a loss of each (N, k).

    With z = scale·margin(cos_y) + prior_y: loss = log(e^r + e^z) − z = softplus(r − z), which neither cancels nor has
    a floor.

    Args:
        stats: from :func:`logsumexp_stats`.
        sample_angular_margin, sample_cosine_margin: (N,), added to the margins below; with gradient if they ask for it.
        label_smoothing: as in :func:`ltloss.functional.margin_cross_entropy`; needs ``with_logit_sum=True``.
        margin: options of :class:`ltloss.margins.Margin`, with a number or (C,) as angular margin (radians) and as
            cosine margin.

    Raises:
        ValueError, TypeError: a margin out of range or of another shape, smoothing without ``with_logit_sum=True``.

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
            f"label_smoothing={label_smoothing} needs the sum of all logits: call logsumexp_stats with "
            "with_logit_sum=True"
        )
    scale, several = stats.logit_scale, stats.labels.dim() == 2
    if several and isinstance(scale, Tensor):
        scale = scale[:, None].expand(stats.labels.shape)
    # A zero feature that keeps its length has logit 0 and direction 0; the bound only makes 0/0 into 0.
    divisor = scale.clamp_min(torch.finfo(scale.dtype).tiny) if isinstance(scale, Tensor) else scale
    of_samples = of_classes.of_samples(stats.labels.clamp(0, stats.num_classes - 1))
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
        others = _log_sum_of_others(others, plain.masked_fill(stats.labels < 0, -torch.inf))
    losses = -F.logsigmoid(z - others)
    if stats.logit_sum is not None and label_smoothing > 0.0:
        # (1-e)(lse - z) + e(lse - mean z) with lse = loss + z; the target enters the mean with its margin.
        whole = stats.logit_sum[:, None] if several else stats.logit_sum
        mean = (whole - stats.target_logit + target_with_margin) / stats.num_classes
        losses = losses + label_smoothing * (z - mean)
    return losses.masked_fill(stats.labels < 0, 0.0)


def focal_losses(losses: Tensor, gamma: float = 2.0) -> Tensor:
    """(1 − p)^γ·ℓ of every loss ℓ = −log p: samples that are right already count less.

    Args:
        losses: (N,), not negative, as :func:`margin_losses` gives them.
        gamma: γ >= 0; 0 leaves the losses as they are.

    Returns:
        (N,). The slope at ℓ = 0, where p is 1, is 0 for any γ > 0, also below 1.

    Raises:
        TypeError, ValueError: a γ that is no number or negative.

    Source: Lin et al., Focal loss, ICCV 2017, eq. 4.

    Example:
        >>> import torch
        >>> from ltloss.extend import focal_losses
        >>> focal_losses(torch.tensor([0.0, 1.0, 5.0]))
        tensor([0.0000, 0.3996, 4.9328])
    """
    gamma = check_number("gamma", gamma, at_least=0.0)
    # 1 − p is ℓ to the last bit there, and its power alone would have no finite slope for γ < 1.
    tiny = losses < torch.finfo(losses.dtype).eps
    large = torch.where(tiny, 1.0, losses)
    return torch.where(tiny, torch.where(tiny, losses, 0.0) ** (1.0 + gamma), (-torch.expm1(-large)) ** gamma * large)


def poly1_losses(losses: Tensor, epsilon: float = 1.0) -> Tensor:
    """ℓ + ε·(1 − p) of every loss ℓ = −log p: the first term of its series in 1 − p has the weight 1 + ε.

    Args:
        losses: (N,), as :func:`margin_losses` gives them.
        epsilon: ε >= −1; 0 leaves the losses as they are.

    Returns:
        (N,).

    Raises:
        TypeError, ValueError: an ε that is no number or below −1.

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
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Weight the losses (N,) and reduce them; ``mean`` divides by the summed weights of the counted samples.

    Args:
        losses: (N,), or (N, k) of several labels a sample.
        labels: alike, -1 for what does not count (``stats.labels``).
        class_weight: (C,), or None.
        sample_weight: shaped as the losses, or None; multiplies the class's.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or (N,) for ``"none"``. A mean over nothing is 0, with zero gradients.

    Raises:
        ValueError: an unknown reduction, weights of another shape.

    Example:
        >>> import torch
        >>> from ltloss.extend import reduce_losses
        >>> reduce_losses(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([0, 1, -1]))
        tensor(2.)
    """
    check_choice("reduction", reduction, get_args(Reduction))
    counted = labels >= 0
    weights = counted.to(losses.dtype)
    if class_weight is not None:
        weights = weights * class_weight[labels.clamp(0, class_weight.shape[0] - 1)].to(losses.dtype)
    if sample_weight is not None:
        if sample_weight.shape != losses.shape:
            raise ValueError(
                f"sample_weight must have the shape {tuple(losses.shape)}; got {tuple(sample_weight.shape)}"
            )
        weights = weights * sample_weight.to(losses.dtype)
    weighted = torch.where(counted, losses, 0.0) * weights
    if reduction == "none":
        return weighted if weighted.dim() == 1 else weighted.sum(1)
    if reduction == "sum":
        return weighted.sum()
    total = weights.sum()
    return weighted.sum() / torch.where(total == 0, 1.0, total)
