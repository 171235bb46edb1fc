"""The result types that :mod:`ltloss.functional` and :mod:`ltloss.reference` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

__all__ = ["MarginLoss", "NearestPrototype", "Partials", "Reduction", "TakeGradient", "TopK"]

Reduction = Literal["none", "mean", "sum"]
# Called with (start, stop, gradient): the gradient (stop - start, D) of prototypes [start, stop), float32 or float64.
# The callee may overwrite it.
TakeGradient = Callable[[int, int, Tensor], None]


class NearestPrototype(NamedTuple):
    """The largest cosine of each prototype to any other, and the index of that other one.

    Attributes:
        cosine: (R,) in [-1, 1].
        index: (R,) int64, the lowest of equally near ones. With a single class both are -1.

    Example:
        >>> import torch
        >>> from ltloss.functional import nearest_prototype
        >>> nearest_prototype(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        NearestPrototype(cosine=tensor([0.6000, 0.6000]), index=tensor([1, 0]))

    See also: :func:`ltloss.functional.nearest_prototype`, which returns it.
    """

    cosine: Tensor
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index


class TopK(NamedTuple):
    """The k classes with the largest cosine, best first; equal ones in class order.

    Where prototypes keep their length, the classes with the largest logit.

    Attributes:
        cosine: (N, k) in [-1, 1].
        index: (N, k) int64.

    Example:
        >>> import torch
        >>> from ltloss.functional import top_k
        >>> top_k(torch.tensor([[3.0, 4.0]]), torch.eye(2), k=2)
        TopK(cosine=tensor([[0.8000, 0.6000]]), index=tensor([[1, 0]]))

    See also: :func:`ltloss.functional.top_k` and :meth:`ltloss.PrototypeHead.predict`, which return it.
    """

    cosine: Tensor
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index


class Partials(NamedTuple):
    """The result of the pass over the prototypes: one partial sum for each sample and each split of the classes.

    A split is a chunk on a CPU, a part of a launch on a GPU or a rank of a process group. All concatenate along S.

    Attributes:
        sum: (S, N) Σ exp(l_c − max) over the classes of a split, without the target.
        max: (S, N).
        logit_sum: (S, N) Σ s·cos_c over all classes of a split, or None if it was not requested.
        target_cosine: (N,) cos_y; 0 where the target is not among these classes, NaN for a label that is no class.
            Where prototypes keep their length, x̂·w_y or x·w_y.
        norm: (N,) ‖x‖ where it multiplies a cosine, else None.
        class_scale: (C,) for the backward: 1/‖w‖, or s·log2 e/‖w‖ in the kernels. ‖w‖ counts as 1 where prototypes
            keep their length.
    """

    sum: Tensor
    max: Tensor
    logit_sum: Tensor | None
    target_cosine: Tensor
    norm: Tensor | None
    class_scale: Tensor


class MarginLoss(NamedTuple):
    """The loss, and what the backward needs to know about each sample.

    Attributes:
        loss: a scalar, or (N,) for ``reduction="none"``.
        coefficients: (4, N), or (5, N) if there is a ``norm``. Rows 1 to 4 include the class weight:
            0 shift     log-sum-exp over the other classes
            1 d_lse     ∂loss/∂(log-sum-exp)
            2 d_target  the whole gradient at the target logit
            3 d_all     the gradient that label smoothing gives every class
            4 d_norm    ∂loss/∂‖x‖
        inverse_weight_sum: scalar, 1/Σ weights for ``reduction="mean"``, else 1.
        max_coefficient: scalar, the largest |coefficient|, by which the kernels scale float16 gradients; 0 elsewhere.
    """

    loss: Tensor
    coefficients: Tensor
    inverse_weight_sum: Tensor
    max_coefficient: Tensor
