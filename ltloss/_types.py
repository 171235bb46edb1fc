"""The small result types that :mod:`ltloss.functional` and :mod:`ltloss.reference` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

__all__ = ["MarginLoss", "NearestPrototype", "Partials", "Reduction", "TakeGradient", "TopK"]

Reduction = Literal["none", "mean", "sum"]
# Takes the gradient (stop - start, D) of the prototypes [start, stop), float32 or float64, and may use it up.
TakeGradient = Callable[[int, int, Tensor], None]


class NearestPrototype(NamedTuple):
    """Largest cosine of each prototype to any other, and which one that is.

    ``cosine`` (R,) in [-1, 1]; ``index`` (R,) int64, the lowest where several are equally near. With a single class
    there is no other: cosine -1 and index -1.
    """

    cosine: Tensor
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index


class TopK(NamedTuple):
    """The k classes with the largest cosine, or logit where prototypes keep their length, best first; equal ones in
    class order.

    ``cosine`` (N, k) in [-1, 1]; ``index`` (N, k) int64.
    """

    cosine: Tensor
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index


class Partials(NamedTuple):
    """What the pass over the prototypes leaves of each sample, before the splits of the classes are added.

    A chunk of a CPU, a split of a GPU and a rank of a process group are splits alike: they concatenate along S.

    Attributes:
        sum: (S, N) Σ exp(l_c − max) over the classes of a split but the target.
        max: (S, N).
        logit_sum: (S, N) Σ s·cos_c over all classes of a split, or None where it was not asked for.
        target_cosine: (N,) cos_y: 0 where the target is not among these classes, NaN for a label that is no class.
            Where prototypes keep their length x̂·w_y, or x·w_y.
        norm: (N,) ‖x‖ where features keep their length before a cosine, else None.
        class_scale: (C,) for the backward: 1/‖w‖, or s·log2 e/‖w‖ (kernels); with ‖w‖ = 1 where prototypes keep theirs.
    """

    sum: Tensor
    max: Tensor
    logit_sum: Tensor | None
    target_cosine: Tensor
    norm: Tensor | None
    class_scale: Tensor


class MarginLoss(NamedTuple):
    """The loss and what the backward needs of each sample.

    Attributes:
        loss: a scalar, or (N,) for ``reduction="none"``.
        coefficients: (4, N), or (5, N) where there is a ``norm``; times the weight of the class:
            0 shift     log-sum-exp over the other classes
            1 d_lse     ∂loss/∂(log-sum-exp)
            2 d_target  the whole gradient at the target logit
            3 d_all     the gradient that label smoothing gives every class
            4 d_norm    ∂loss/∂‖x‖
        inverse_weight_sum: scalar, 1/Σ weights for ``reduction="mean"``, else 1.
        max_coefficient: scalar, the largest coefficient; what float16 is scaled by.
    """

    loss: Tensor
    coefficients: Tensor
    inverse_weight_sum: Tensor
    max_coefficient: Tensor
