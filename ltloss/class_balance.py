"""Margins, priors, weights and schedules from class counts. All vectors are (C,), computed once before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ltloss._deprecation import renamed_keywords
from ltloss._validation import check_choice, check_count, check_dense, check_number, check_type, is_whole, shown
from ltloss.ops.labels import checked_labels

__all__ = [
    "DeferredWeights",
    "counts_from_labels",
    "effective_number_weights",
    "inverse_frequency_weights",
    "log_prior_from_counts",
    "margins_from_counts",
]

Counts = Tensor | Sequence[int] | np.ndarray[Any, Any]
Normalize = Literal["none", "max"]


def counts_from_labels(labels: Counts, num_classes: int, *, ignore_index: int = -100) -> Tensor:
    """Count the samples of each class, n_c = #{i : y_i = c}.

    Args:
        labels: (N,) integers in [0, C), or ``ignore_index``.
        num_classes: C.
        ignore_index: a label that is not counted.

    Returns:
        (C,) int64.

    Raises:
        IndexError: a label outside [0, C) that is not ``ignore_index``, with its position.
        TypeError: labels that are not integers.
        ValueError: ``num_classes`` that is not an integer >= 1.

    See also: :func:`margins_from_counts`, :func:`log_prior_from_counts` and :func:`effective_number_weights`, which
    take the counts.

    Example:
        >>> from ltloss.class_balance import counts_from_labels
        >>> counts_from_labels([0, 2, 2], 3)
        tensor([1, 0, 2])
    """
    num_classes = check_count("num_classes", num_classes)
    ignore_index = check_type("ignore_index", ignore_index, int)
    array = labels if isinstance(labels, Tensor) else np.asarray(labels)
    if isinstance(array, np.ndarray) and not array.size:
        array = array.astype(np.int64)  # an empty list has no dtype of its own
    if isinstance(array, np.ndarray) and array.dtype.kind not in "iu":
        raise TypeError(f"labels must have an integer dtype; got {type(labels).__name__} of {array.dtype}")
    vector = torch.as_tensor(array).flatten()
    if not is_whole(vector):
        raise TypeError(f"labels must have an integer dtype; got {vector.dtype}")
    checked = checked_labels(vector, num_classes, ignore_index, "labels")
    return torch.bincount(checked[checked != ignore_index], minlength=num_classes)


def checked_counts(class_counts: Counts) -> Tensor:
    """Return the counts (C,) in float64. Raise unless they are numbers, one per class, all positive."""
    if not isinstance(class_counts, Tensor):
        array = np.asarray(class_counts)
        if array.dtype.kind not in "iuf":
            raise TypeError(
                "class_counts must be numbers, one per class in the order of the labels (C,); got "
                f"{type(class_counts).__name__} of {array.dtype}"
            )
        class_counts = torch.as_tensor(array, device="cpu")  # also where the default device is meta
    check_dense("class_counts", class_counts)
    if class_counts.is_meta:
        raise ValueError("class_counts must hold values; got a tensor on the meta device")
    counts = class_counts.detach().to(torch.float64)
    if counts.dim() != 1 or counts.numel() == 0:
        got = f"shape {tuple(counts.shape)}" if counts.dim() else f"the number {counts:g}"
        raise ValueError(f"class_counts must be a vector (C,) with C >= 1; got {got}")
    if not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()):
        raise ValueError("class_counts must be finite and not negative; got " + _abridged(counts))
    empty = (counts == 0).nonzero()[:, 0]
    if empty.numel():
        raise ValueError(
            f"{empty.numel()} of {counts.numel()} classes have no samples (the first is class {int(empty[0])}); "
            "leave them out and renumber the labels, or pass class_counts.clamp(min=1) to count them as one"
        )
    return counts


def _abridged(values: Tensor) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:8].tolist())
    return f"[{shown}{', ...' if values.numel() > 8 else ''}]"


@renamed_keywords(power="count_exponent")
def margins_from_counts(
    class_counts: Counts, margin: float = 0.5, *, count_exponent: float = 0.25, normalize: Normalize = "none"
) -> Tensor:
    """Margins per class, m_c = margin · n_c^(−count_exponent): the rarer the class, the larger its margin.

    Args:
        class_counts: (C,) training samples per class, all > 0.
        margin: the margin of a class with one sample, or with ``normalize="max"`` of the rarest class. In radians for
            an angular margin, in units of the cosine for LDAM.
        count_exponent: 1/k; 0.25 in source A and in LDAM.
        normalize: ``"none"``, or ``"max"`` to rescale so that the rarest class has exactly ``margin`` (the LDAM
            convention).

    Returns:
        (C,) float32.

    Raises:
        TypeError, ValueError: counts that are not numbers, not a vector, or not all positive; a negative margin or
            exponent; an unknown ``normalize``.

    See also: :class:`ltloss.LDAMLoss` and :class:`ltloss.LongTailLoss`, which call it.

    Sources: source A; Cao et al., LDAM, NeurIPS 2019, section 3.1.

    Example:
        >>> from ltloss.class_balance import margins_from_counts
        >>> margins_from_counts([16, 1], 0.5)
        tensor([0.2500, 0.5000])
    """
    margin = check_number("margin", margin, at_least=0.0)
    count_exponent = check_number("count_exponent", count_exponent, at_least=0.0)
    check_choice("normalize", normalize, get_args(Normalize))
    margins = checked_counts(class_counts) ** -count_exponent
    if normalize == "max":
        margins = margins / margins.max()
    return (margin * margins).float()


def log_prior_from_counts(class_counts: Counts, tau: float = 1.0) -> Tensor:
    """Scaled log prior of the classes, τ·log π_c with π_c = n_c/Σn. Added to the training logits, it balances them.

    Args:
        class_counts: (C,) training samples per class, all > 0.
        tau: τ >= 0; 1 is the balanced softmax.

    Returns:
        (C,) float32.

    Raises:
        TypeError, ValueError: counts that are not numbers, not a vector, or not all positive; a negative ``tau``.

    See also: :class:`ltloss.LogitAdjustedLoss`, which calls it; :func:`effective_number_weights` weights the loss
    instead.

    Sources: Menon et al., ICLR 2021, eq. 10; Ren et al., NeurIPS 2020 (τ = 1).

    Example:
        >>> from ltloss.class_balance import log_prior_from_counts
        >>> log_prior_from_counts([3, 1]).exp()
        tensor([0.7500, 0.2500])
    """
    tau = check_number("tau", tau, at_least=0.0)
    counts = checked_counts(class_counts)
    return (tau * (counts / counts.sum()).log()).float()


def effective_number_weights(class_counts: Counts, beta: float = 0.9999) -> Tensor:
    """Class-balanced weights, (1 − β)/(1 − β^n_c), scaled to mean 1.

    Args:
        class_counts: (C,) training samples per class, all > 0.
        beta: β in [0, 1). 1/(1 − β) is the limit of the effective number of samples of a class.

    Returns:
        (C,) float32.

    Raises:
        TypeError, ValueError: counts that are not numbers, not a vector, or not all positive; a ``beta`` outside
            [0, 1).

    See also: :func:`inverse_frequency_weights`, the limit β → 1; :class:`DeferredWeights`, to use them from an epoch
    on.

    Source: Cui et al., Class-balanced loss based on effective number of samples, CVPR 2019, eq. 7.

    Example:
        >>> from ltloss.class_balance import effective_number_weights
        >>> effective_number_weights([2, 1], beta=0.5)
        tensor([0.8000, 1.2000])
    """
    beta = check_number("beta", beta, at_least=0.0)
    if beta >= 1.0:
        raise ValueError(f"beta must be < 1 (at 1 the weights are those of inverse_frequency_weights); got {beta}")
    counts = checked_counts(class_counts)
    # expm1, because β^n rounds to 1 for β near 1. log1p(β - 1) would be no more exact than log β here.
    weights = -(1.0 - beta) / torch.expm1(counts * np.log(beta)) if beta > 0.0 else torch.ones_like(counts)
    return (weights / weights.mean()).float()


@renamed_keywords(power="count_exponent")
def inverse_frequency_weights(class_counts: Counts, count_exponent: float = 1.0) -> Tensor:
    """Weights proportional to n_c^(−count_exponent), scaled to mean 1.

    Args:
        class_counts: (C,) training samples per class, all > 0.
        count_exponent: 1 for inverse frequency, 0.5 for the usual softer variant, 0 for equal weights.

    Returns:
        (C,) float32.

    Raises:
        TypeError, ValueError: counts that are not numbers, not a vector, or not all positive; an exponent that is not
            finite.

    See also: :func:`effective_number_weights`; :class:`DeferredWeights`, to use them from an epoch on.

    Example:
        >>> from ltloss.class_balance import inverse_frequency_weights
        >>> inverse_frequency_weights([3, 1])
        tensor([0.5000, 1.5000])
    """
    count_exponent = check_number("count_exponent", count_exponent)
    weights = checked_counts(class_counts) ** -count_exponent
    weights = (weights / weights.mean()).float()
    if not bool(weights.isfinite().all()):
        raise ValueError(
            f"count_exponent must give finite weights; got {count_exponent:g}, which gives {_abridged(weights)}"
        )
    return weights


@dataclass(frozen=True)
class DeferredWeights:
    """Deferred re-weighting (DRW): no class weights before the epoch ``start_epoch``, ``weights`` from then on.

    Attributes:
        weights: (C,), for instance from :func:`effective_number_weights`.
        start_epoch: first epoch with weights, counted from 0; 160 of 200 in the source.

    Raises:
        TypeError, ValueError: a ``start_epoch`` that is not a number >= 0.

    See also: :meth:`ltloss.CombinedMarginLoss.set_class_weight`, to which the result of each epoch is passed.

    Source: Cao et al., LDAM, NeurIPS 2019, section 3.3 and algorithm 1.

    Example:
        >>> from ltloss.class_balance import DeferredWeights, effective_number_weights
        >>> schedule = DeferredWeights(effective_number_weights([2, 1], beta=0.5), start_epoch=160)
        >>> schedule(0) is None, schedule(160)
        (True, tensor([0.8000, 1.2000]))
    """

    weights: Tensor
    start_epoch: int

    def __post_init__(self) -> None:
        check_type("start_epoch", self.start_epoch, int)
        check_number("start_epoch", self.start_epoch, at_least=0)
        if not isinstance(self.weights, Tensor) or self.weights.dim() != 1:
            raise TypeError(f"weights must be a tensor (C,); got {shown(self.weights)}")

    def __call__(self, epoch: int) -> Tensor | None:
        """Class weights (C,) for an epoch, or None before ``start_epoch``."""
        return self.weights if epoch >= self.start_epoch else None
