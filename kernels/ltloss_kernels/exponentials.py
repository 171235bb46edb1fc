"""The exponentials of a forward in two bytes each, kept so that its backward need not multiply for the logits again."""

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

_UNIT = 8  # entries of 16 bytes, which the copy engine wants rows to start at


class Exponentials(NamedTuple):
    """2^(l·log2 e - m) of every sample and class but the target, whose entry is 0.

    m is the fixed shift of the pass, or the largest logit of the row so far in the split. A bfloat16 has the range of
    a float32: every entry is right to 2^-8 of itself.
    """

    values: Tensor  # (N, C) bfloat16, rows filled up to whole 16 bytes
    shifts: Tensor  # (class tiles of the forward, N) float32: m in units of log 2, where it is no fixed shift

    def rows(self, rows: slice) -> Exponentials:
        """Those of some samples."""
        return Exponentials(part(self.values, rows), part(self.shifts, rows, 1))

    @property
    def tile_classes(self) -> int:
        """How many classes share a shift: a power of two, and all of them if there is one tile."""
        (tiles_there, _), (_, classes), size = self.shifts.shape, self.values.shape, 1
        while ceil_div(classes, size) > tiles_there:
            size *= 2
        return size


def exponentials_bytes(features: Tensor, prototypes: Tensor) -> int:
    """What :func:`new_exponentials` takes of memory."""
    (samples, classes), (class_tiles, _) = _shapes(features, prototypes)
    return samples * (2 * classes + 4 * class_tiles)


def new_exponentials(features: Tensor, prototypes: Tensor, fake: bool = False) -> Exponentials:
    """What ``partials`` fills for ``gradients``; uninitialised. ``fake`` is for backends that see a difference."""
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
