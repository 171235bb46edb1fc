"""The small result types that :mod:`ltloss.functional` and :mod:`ltloss.reference` share."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

__all__ = ["NearestPrototype", "Reduction", "TopK"]

Reduction = Literal["none", "mean", "sum"]


class NearestPrototype(NamedTuple):
    """Largest cosine of each prototype to any other, and which one that is.

    ``cosine`` (R,) in [-1, 1]; ``index`` (R,) int64, the lowest where several are equally near. With a single class
    there is
    no other: cosine -1 and index -1.
    """

    cosine: Tensor
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index


class TopK(NamedTuple):
    """The k classes with the largest cosine, best first; equal cosines in class order.

    ``cosine`` (N, k) in [-1, 1]; ``index`` (N, k) int64.
    """

    cosine: Tensor
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
