"""The exponentials of a forward in two bytes each, kept so that the backward need not compute the logits again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ltloss_kernels.config import tile_table as tiles
from ltloss_kernels.config.chunking import ceil_div
from ltloss_kernels.config.operands import part, product_dtype
from ltloss_kernels.config.precision import product_precision
from ltloss_kernels.running import interpreting

__all__ = ["Exponentials", "exponentials_bytes", "new_exponentials"]

_LEAST_CLASSES = 64  # of a tile that is used or may be tuned to
_UNIT = 8  # entries in 16 bytes: rows start at multiples of this, as the copy engine needs


class Exponentials(NamedTuple):
    """2^(l·log2 e - m) of every sample and class but the target, whose entry is 0.

    m is the fixed shift of the pass, or the running maximum of the row in its split. A bfloat16 has the range of a
    float32, so every entry has a relative error of at most 2^-8.
    """

    values: Tensor  # (N, C rounded up to a multiple of 8) bfloat16
    shifts: Tensor  # (class tiles of the forward, N) float32: m in units of log 2; unused with a fixed shift

    def rows(self, rows: slice) -> Exponentials:
        """The exponentials of these samples."""
        return Exponentials(part(self.values, rows), part(self.shifts, rows, 1))

    @property
    def tile_classes(self) -> int:
        """How many classes share a shift: the smallest power of two with which all classes fit the tiles."""
        (tiles_there, _), (_, classes), size = self.shifts.shape, self.values.shape, 1
        while ceil_div(classes, size) > tiles_there:
            size *= 2
        return size


def exponentials_bytes(features: Tensor, prototypes: Tensor) -> int:
    """Bytes that :func:`new_exponentials` allocates at most: it does not ask for the tile, which no graph can trace."""
    samples, classes = features.shape[0], prototypes.shape[0]
    return samples * (2 * ceil_div(classes, _UNIT) * _UNIT + 4 * ceil_div(classes, _LEAST_CLASSES))


def new_exponentials(features: Tensor, prototypes: Tensor, fake: bool = False) -> Exponentials:
    """Uninitialised memory that ``partials`` fills and ``gradients`` reads. ``fake`` matters to other backends only."""
    values, shifts = _shapes(features, prototypes)
    return Exponentials(
        features.new_empty(values, dtype=torch.bfloat16), features.new_empty(shifts, dtype=torch.float32)
    )


def _shapes(features: Tensor, prototypes: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    (samples, width), classes = features.shape, prototypes.shape[0]
    dtype = product_dtype(*(_computed(one.dtype) for one in (features, prototypes)))
    arch = tiles.architecture(features.device)
    tile = tiles.forward_tile(arch, dtype, product_precision(), samples, width)
    return (samples, ceil_div(classes, _UNIT) * _UNIT), (ceil_div(classes, tile.classes), samples)


def _computed(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 and interpreting() else dtype  # see ``running.widened``
