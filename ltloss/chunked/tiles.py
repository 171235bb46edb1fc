"""A tile of logits: how large it is, how it is made, its target entries, and what is kept of it for the backward."""

from __future__ import annotations

import mmap
from typing import NamedTuple

import torch
from torch import Tensor

from ltloss.float8 import FLOAT8, widened

__all__ = ["Blocks", "Exponentials", "TargetColumn", "Tiles", "block_sizes", "in_huge_pages"]


class Blocks(NamedTuple):
    """How many rows and how many classes one tile of logits holds."""

    rows: int
    classes: int


def block_sizes(rows: int, classes: int, width: int, device: torch.device) -> Blocks:
    """Choose the tile: both it and the normalised prototypes beside it hold at most ``budget`` elements.

    4 MiB each on a CPU (measured, see docs/performance.md: 2 to 16 MiB are within a tenth of each other, 1 and 32 MiB
    slower); 64 MiB on a GPU, where each launch has to pay for itself.
    """
    budget = 1 << (20 if device.type == "cpu" else 24)
    row_block = max(1, min(rows, 1024))
    class_block = max(64, min(budget // row_block, budget // max(1, width)))
    return Blocks(row_block, min(class_block, classes))


class Exponentials(NamedTuple):
    """exp(logit - shift) of every tile in two bytes, so that the backward need not multiply for the logits again.

    The shift is the largest logit of the row so far. A bfloat16 has the range of a float32, so every entry is
    right to 2^-8 of itself, however far it lies below the largest: also of a class that is far from all samples.
    """

    values: Tensor  # (N·C,) bfloat16, one tile after the other
    shifts: Tensor  # (chunks, N)

    def of(self, chunk: int, rows: slice, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Values and shifts of one row block and a chunk, which holds the classes [start, stop)."""
        width = stop - start
        first = start * self.shifts.shape[1] + rows.start * width
        values = self.values[first : first + (rows.stop - rows.start) * width]
        return values.view(-1, width), self.shifts[chunk, rows]


def in_huge_pages(entries: int) -> Tensor:
    """Memory of the CPU (entries,), bfloat16. Mapping pages of 4 KiB takes longer than writing to them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(entries, dtype=torch.bfloat16)
    pages = mmap.mmap(-1, 2 * entries, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.bfloat16)


class TargetColumn:
    """Reads and writes the target entry of every row of a tile, for labels inside and outside of it alike.

    Gather, select and scatter on N-vectors need no list of the labels inside, hence no host synchronisation on a GPU.
    """

    def __init__(self, labels: Tensor, start: int, width: int) -> None:
        local = labels - start
        self.inside = ((local >= 0) & (local < width))[:, None]
        self.column = local.clamp(0, width - 1)[:, None]

    def fill(self, tile: Tensor, value: Tensor | float) -> None:
        """Write the value, or that of the row, where the target is inside."""
        fill = value[:, None] if isinstance(value, Tensor) else tile.new_tensor(value)
        tile.scatter_(1, self.column, torch.where(self.inside, fill, tile.gather(1, self.column)))


class Tiles:
    """Walks over the classes in chunks: the factors of a product and logits in buffers that are allocated once.

    ``inverse`` (C,): 1/‖w‖, or None for prototypes that keep their length. ``slope``: where logits are bent beyond a
    ``threshold``, the derivative at each of the last tile.
    """

    def __init__(
        self,
        u: Tensor,
        prototypes: Tensor,
        inverse: Tensor | None,
        log_prior: Tensor | None,
        blocks: Blocks,
        threshold: Tensor | None = None,
        polynomial: Tensor | None = None,
    ) -> None:
        self.u, self.prototypes, self.inverse, self.blocks = u, prototypes, inverse, blocks
        self.log_prior, self.threshold, self.polynomial = (
            None if one is None else one.to(u.dtype) for one in (log_prior, threshold, polynomial)
        )
        self._logits = u.new_empty(blocks.rows * blocks.classes)
        self._unit = u.new_empty(blocks.classes, u.shape[1])

    def unit_prototypes(self, start: int, stop: int) -> Tensor:
        """ŵ of the chunk (stop - start, D), or w itself."""
        unit = self._unit[: stop - start]
        prototypes = self.prototypes[start:stop]
        if self.inverse is None:
            return prototypes if prototypes.dtype == unit.dtype else unit.copy_(prototypes)
        if prototypes.dtype == FLOAT8:
            prototypes = widened(prototypes, unit)
        return torch.mul(prototypes, self.inverse[start:stop, None], out=unit)

    def empty(self, rows: slice, start: int, stop: int) -> Tensor:
        """The buffer of one row block and the chunk, with what the last tile left in it."""
        height, width = rows.stop - rows.start, stop - start
        return self._logits[: height * width].view(height, width)

    def logits(self, unit: Tensor, rows: slice, start: int, stop: int) -> Tensor:
        """s·cos + log-prior, or s·(x·w) + log-prior, of one row block and the chunk; bent before the prior."""
        tile = self.empty(rows, start, stop)
        torch.mm(self.u[rows], unit.t(), out=tile)
        if self.threshold is not None and self.polynomial is not None:
            p0, p1, p2 = self.polynomial
            hard = tile > self.threshold[rows, None]
            self.slope = torch.where(hard, p1 + 2.0 * p2 * tile, 1.0)
            tile.copy_(torch.where(hard, (p2 * tile + p1) * tile + p0, tile))
        if self.log_prior is not None:
            tile.add_(self.log_prior[start:stop])
        return tile
