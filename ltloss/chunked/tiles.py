"""Tiles of logits: their size, their computation, their target entries, and what the backward keeps of them."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Iterator
from typing import Any, NamedTuple

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

    4 MiB each on a CPU (measured, see docs/performance-record.md: 2 to 16 MiB are within a tenth of each other, 1 and
    32 MiB slower); 64 MiB on a GPU, where each launch has to pay for itself.
    """
    budget = 1 << (20 if device.type == "cpu" else 24)
    row_block = max(1, min(rows, 1024))
    class_block = max(64, min(budget // row_block, budget // max(1, width)))
    return Blocks(row_block, min(class_block, classes))


class Exponentials(NamedTuple):
    """exp(logit - shift) of every tile in bfloat16, so that the backward need not recompute the logits.

    The shift is the largest logit of the row so far. bfloat16 has the range of float32, so every entry has a relative
    error of 2^-8 at most, even for classes that are far from all samples.
    """

    values: Tensor  # (N·C,) bfloat16, one tile after the other
    shifts: Tensor  # (chunks, N)

    def of(self, chunk: int, rows: slice, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Values and shifts of one row block and a chunk, which holds the classes [start, stop)."""
        width = stop - start
        first = start * self.shifts.shape[1] + rows.start * width
        values = self.values[first : first + (rows.stop - rows.start) * width]
        return values.view(-1, width), self.shifts[chunk, rows]


# In bytes. Larger blocks glibc maps anew each time, and returns to the system when they are freed.
_KEPT_BY_ALLOCATOR = 31 << 20


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one, up to 64 MiB.

    Once a block was freed, the allocator keeps twice its size. Until then it gives the tiles of a step back to the
    system, which clears their pages for the next step: a quarter of the time of a small head. The pages of this block
    are never touched.
    """
    torch.UntypedStorage(_KEPT_BY_ALLOCATOR)  # type: ignore[no-untyped-call]


def in_huge_pages(entries: int) -> Tensor:
    """Memory of the CPU (entries,), bfloat16. Mapping pages of 4 KiB takes longer than writing to them."""
    if 2 * entries < _KEPT_BY_ALLOCATOR or not hasattr(mmap, "MADV_HUGEPAGE"):
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
        fill = value[:, None] if isinstance(value, Tensor) else value
        tile.scatter_(1, self.column, torch.where(self.inside, fill, tile.gather(1, self.column)))


class Tiles:
    """Walks over the classes in chunks: the factors of a product and logits in buffers that are allocated once.

    With K sub-centres a class the prototypes are (C, K, D), and a logit is the largest of K. ``inverse`` (C,) or
    (C, K): 1/‖w‖, or None for prototypes that keep their length. ``slope``: where logits are bent beyond a
    ``threshold``, the derivative at each of the last tile.
    """

    def __init__(
        self,
        u: Tensor,
        prototypes: Tensor,
        inverse: Tensor | None,
        log_prior: Tensor | None,
        blocks: Blocks,
        backwards: bool = False,
        threshold: Tensor | None = None,
        polynomial: Tensor | None = None,
    ) -> None:
        if u.device.type == "cpu":
            keep_freed_memory()
        self.u, self.prototypes, self.inverse, self.blocks, self.backwards = u, prototypes, inverse, blocks, backwards
        self.log_prior, self.threshold, self.polynomial = (
            None if one is None else one.to(u.dtype) for one in (log_prior, threshold, polynomial)
        )
        self.several = prototypes.dim() == 3  # sub-centres
        self._logits = u.new_empty(blocks.rows * blocks.classes)
        self._other = torch.empty_like(self._logits) if self.several else self._logits
        centers = prototypes.shape[1] if self.several and backwards else 0
        self._nearer = u.new_empty(centers, len(self._logits), dtype=torch.bool)
        self._unit = u.new_empty(blocks.classes, *prototypes.shape[1:])

    def unit_prototypes(self, start: int, stop: int) -> Tensor:
        """ŵ of the chunk (stop - start, D) or (stop - start, K, D), or w itself."""
        unit = self._unit[: stop - start]
        prototypes = self.prototypes[start:stop]
        if self.inverse is None:
            return prototypes if prototypes.dtype == unit.dtype else unit.copy_(prototypes)
        if prototypes.dtype == FLOAT8:
            prototypes = widened(prototypes, unit)
        return torch.mul(prototypes, self.inverse[start:stop, ..., None], out=unit)

    def empty(self, rows: slice, start: int, stop: int) -> Tensor:
        """The buffer of one row block and the chunk, with what the last tile left in it."""
        return self._part(self._logits, rows.stop - rows.start, stop - start)

    @staticmethod
    def _part(buffer: Tensor, height: int, width: int) -> Tensor:
        return buffer[: height * width].view(height, width)

    def logits(self, unit: Tensor, rows: slice, start: int, stop: int, sums: Tensor | None = None) -> Tensor:
        """s·cos + log-prior, or s·(x·w) + log-prior, of one row block and the chunk; bent before the prior.

        To ``sums`` (N,) those of each row are added, without the prior.
        """
        tile = self.empty(rows, start, stop)
        if not self.several:
            torch.mm(self.u[rows], unit.t(), out=tile)
        else:
            self._of_nearest(tile, self.u[rows], unit)
        if sums is not None:
            sums[rows] += tile.sum(1)
        if self.threshold is not None and self.polynomial is not None:
            p0, p1, p2 = self.polynomial
            hard = tile > self.threshold[rows, None]
            if self.backwards:
                self.slope = torch.where(hard, p1 + 2.0 * p2 * tile, 1.0)
            tile.copy_(torch.where(hard, (p2 * tile + p1) * tile + p0, tile))
        if self.log_prior is not None:
            tile.add_(self.log_prior[start:stop])
        return tile

    def _of_nearest(self, tile: Tensor, u: Tensor, unit: Tensor) -> None:
        """The largest of the logits of the sub-centres, and where each exceeds those before it."""
        other = self._part(self._other, *tile.shape)
        torch.mm(u, unit[:, 0].t(), out=tile)
        for k in range(1, unit.shape[1]):
            torch.mm(u, unit[:, k].t(), out=other)
            if self.backwards:
                torch.gt(other, tile, out=self._part(self._nearer[k], *tile.shape))
            torch.maximum(tile, other, out=tile)

    def of_centers(self, gradient: Tensor, *operands: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """The gradient of the last tile's logits (n, c), of each sub-centre in turn: all of it goes to the nearest, of
        equally near ones to the lowest.

        With it, the part of each of ``operands``, (c, D) or (c, K, D), that belongs to the sub-centre.
        """
        if not self.several:
            yield gradient, *operands
            return
        own, zero = self._part(self._other, *gradient.shape), gradient.new_zeros(())
        for k in reversed(range(self.prototypes.shape[1])):
            if k > 0:  # the last one that exceeded those before it is the largest
                torch.where(self._part(self._nearer[k], *gradient.shape), gradient, zero, out=own)
                gradient.sub_(own)
            yield own if k > 0 else gradient, *(None if one is None else one[:, k] for one in operands)
