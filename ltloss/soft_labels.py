"""Soft labels: samples with several weighted classes, as mixup makes them, in one pass over the prototypes."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from ltloss._types import Reduction
from ltloss._validation import check_dense, check_number, check_per_class, check_same_device, check_supervised, shown
from ltloss.extend import logsumexp_stats, margin_losses, reduce_losses
from ltloss.functional import margin_cross_entropy
from ltloss.margins import Margin
from ltloss.runtime import current_debug

__all__ = ["soft_label_cross_entropy", "takes_soft_labels"]


_OPTIONS = inspect.signature(margin_cross_entropy).parameters.keys() - {"features", "prototypes", "labels"}


def soft_label_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    label_weight: Tensor,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    **options: Any,
) -> Tensor:
    r"""Margin cross-entropy with several weighted labels per sample, Σ_j q_ij·ℓ(x_i, y_ij).

    ℓ is :func:`ltloss.functional.margin_cross_entropy`, whose margin acts on class y_ij alone. Without a margin, and
    with Σ_j q_ij = 1, this is the cross-entropy with soft targets, log Σ_c exp(l_c) − Σ_j q_ij·l_{y_ij}.

    Args:
        features: (N, D).
        prototypes: (C, D), or (C, K, D).
        labels: (N, k) integers in [0, C), k ≤ 8. A sample is ignored if its first label is ``ignore_index``; later
            labels that are ``ignore_index`` are dropped.
        label_weight: (N, k) q >= 0, without gradient. In mixup each row sums to 1; any other sum weights the sample.
        class_weight, label_smoothing, reduction: as in ``margin_cross_entropy``. ``"mean"`` divides by the sum of the
            label weights times the class weights.
        options: the other options of ``margin_cross_entropy``, including its margins.

    Returns:
        A scalar, or (N,) for ``"none"``.

    Raises:
        ValueError, TypeError: arguments that do not fit together, or values out of range.
        IndexError: a label outside [0, C) that is not ``ignore_index``, with its position.

    See also: :func:`ltloss.functional.margin_cross_entropy`, for one label per sample; ``forward`` of
    :class:`ltloss.CombinedMarginLoss`, which takes ``label_weight``.

    Source: Zhang et al., mixup: beyond empirical risk minimization, ICLR 2018.

    Example:
        >>> import torch
        >>> from ltloss.soft_labels import soft_label_cross_entropy
        >>> x, w = torch.tensor([[1.0, 1.0]]), torch.eye(3, 2)
        >>> soft_label_cross_entropy(x, w, torch.tensor([[0, 1]]), torch.tensor([[0.7, 0.3]]), scale=2.0)
        tensor(0.8079)
    """
    check_supervised(features, prototypes, labels, several=True)
    _check_weight(labels, label_weight)
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown:
        raise TypeError(f"soft_label_cross_entropy has no option {unknown[0]!r}; it has {', '.join(sorted(_OPTIONS))}")
    margin = {name: options.pop(name) for name in Margin._fields if name in options}
    label_smoothing = check_number("label_smoothing", label_smoothing, at_least=0.0, at_most=1.0)
    options = {"scale": 30.0, "with_logit_sum": label_smoothing > 0.0, **options}
    stats = logsumexp_stats(features, prototypes, labels, **options)
    losses = margin_losses(stats, **margin, label_smoothing=label_smoothing)
    # The weight of a repeated class is added to its first place.
    again = (labels[:, :, None] == labels[:, None, :]).to(label_weight.dtype)
    weight = (again * label_weight[:, None, :]).sum(2)
    factor = None
    if class_weight is not None:
        factor = check_per_class("class_weight", class_weight, stats.num_classes, stats.logsumexp)
    return reduce_losses(losses, stats.labels, class_weight=factor, sample_weight=weight, reduction=reduction)


def takes_soft_labels(loss: Any) -> bool:
    """Return whether ``forward`` of a loss module takes ``label_weight``.

    See also: :func:`soft_label_cross_entropy`.

    Example:
        >>> from ltloss import AdaFaceLoss, ArcFaceLoss
        >>> from ltloss.soft_labels import takes_soft_labels
        >>> takes_soft_labels(ArcFaceLoss(10, 4)), takes_soft_labels(AdaFaceLoss(10, 4))
        (True, False)
    """
    return _takes_soft_labels(type(loss))  # type: ignore[arg-type]  # a class is hashable


@functools.cache
def _takes_soft_labels(kind: Any) -> bool:
    return "label_weight" in inspect.signature(kind.forward).parameters


def _check_weight(labels: Tensor, label_weight: Tensor) -> None:
    if labels.dim() != 2:
        raise ValueError(f"labels must have shape (N, k), k classes per sample; got {tuple(labels.shape)}")
    if not isinstance(label_weight, Tensor) or label_weight.shape != labels.shape:
        raise ValueError(
            f"label_weight must be a tensor shaped like labels, {shown(labels)}; got {shown(label_weight)}"
        )
    if label_weight.requires_grad:
        raise ValueError("label_weight is treated as a constant and gets no gradient; pass label_weight.detach()")
    check_dense("label_weight", label_weight)
    check_same_device(labels=labels, label_weight=label_weight)
    if (label_weight.device.type == "cpu" or current_debug()) and not torch.compiler.is_compiling():
        bad = ~((label_weight >= 0) & label_weight.isfinite())
        if bool(bad.any()):
            place = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"label_weight must be finite and not negative; got {float(label_weight[place])} at {place}"
            )
