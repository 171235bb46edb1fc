"""Searching among prototypes in chunked PyTorch: nearest neighbour of each class, best classes of each sample.

Both keep O(C) or O(N·k) results and one tile of cosines. Equal cosines are settled by the lowest class index, always.
"""

from __future__ import annotations

import contextlib
import math

import torch
from ltloss_kernels.config.precision import float32_products
from torch import Tensor

from ltloss.chunked.equal_rows import EqualRows
from ltloss.chunked.tiles import TargetColumn, block_sizes
from ltloss.float8 import converted
from ltloss.numerics import add_rows_, compute_dtype, inverse_norm, project_, spans

__all__ = [
    "Best",
    "UnitRows",
    "nearest_prototype",
    "nearest_prototype_gradient",
    "search_precision",
    "top_k",
    "top_k_of_products",
]


class Rows:
    """Rows of a matrix, made on demand in the compute dtype."""

    def __init__(self, vectors: Tensor, dtype: torch.dtype) -> None:
        self.vectors, self.dtype = vectors, dtype

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return converted(self.vectors[rows], self.dtype)


class UnitRows(Rows):
    """The same, of length 1."""

    def __init__(self, vectors: Tensor, dtype: torch.dtype) -> None:
        super().__init__(vectors, dtype)
        self.inverse = inverse_norm(vectors, dtype)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return super().__getitem__(rows) * self.inverse[rows, None]


class Best:
    """Largest cosine so far and its index. Fed in ascending class order, a strict comparison keeps the lowest index."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self.cosine = like.new_full((rows,), -math.inf)
        self.index = torch.full((rows,), -1, dtype=torch.int64, device=like.device)

    def update(self, rows: slice, tile: Tensor, dim: int, offset: int) -> None:
        """Update with a tile whose dimension ``dim`` runs over the classes from ``offset`` on."""
        candidate = tile.amax(dim)
        best = self.cosine[rows]
        better = (candidate > best) | (candidate.isnan() & ~best.isnan())
        # A row improves about ln(number of tiles) times, so the slow part, finding the position, is rare.
        improved = better.nonzero()[:, 0]
        if improved.numel():
            best[improved] = candidate[improved]
            self.index[rows][improved] = tile.index_select(1 - dim, improved).argmax(dim) + offset

    def result(self) -> tuple[Tensor, Tensor]:
        """Cosines and indices; -1 and -1 where there is no other."""
        alone = self.index < 0  # no other class at all
        return torch.where(alone, -1.0, self.cosine.clamp(-1.0, 1.0)), self.index


def search_precision(allow_tf32: bool) -> contextlib.AbstractContextManager[None]:
    """Within the block, products of float32 matrices as PyTorch is set; without ``allow_tf32`` in float32."""
    return contextlib.nullcontext() if allow_tf32 else float32_products("highest")


def nearest_prototype(prototypes: Tensor, rows: Tensor | None, allow_tf32: bool) -> tuple[Tensor, Tensor]:
    """See :func:`ltloss.functional.nearest_prototype`."""
    unit = UnitRows(prototypes, compute_dtype(prototypes))
    with search_precision(allow_tf32):
        cosine, index = _nearest_of_all(unit) if rows is None else _nearest_of_rows(unit, rows)
    if prototypes.shape[0] == 1 or index.numel() == 0:
        return cosine, index
    copies = EqualRows(prototypes, index)
    if copies.any:
        own = torch.arange(index.numel(), device=index.device) if rows is None else rows
        group = copies.group(index)
        lowest = copies.member(group, 0)
        # A class is not its own neighbour: the lowest of its copies is found by all the others, and finds the second.
        index = torch.where(lowest == own, copies.member(group, (lowest == own).to(torch.int64)), lowest)
    return cosine, index


def _nearest_of_all(unit: UnitRows) -> tuple[Tensor, Tensor]:
    """Each unordered pair once: a tile off the diagonal serves its rows and, transposed, its columns."""
    c, d = unit.vectors.shape
    best = Best(c, unit.inverse)
    size = min(block_sizes(c, c, d, unit.vectors.device))
    buffer = unit.inverse.new_empty(size * size)

    def cosines(left: Tensor, right: Tensor) -> Tensor:
        tile = buffer[: left.shape[0] * right.shape[0]].view(left.shape[0], right.shape[0])
        return torch.mm(left, right.t(), out=tile)

    blocks = [slice(*span) for span in spans(c, size)]
    for i, rows in enumerate(blocks):
        left = unit[rows]
        best.update(rows, cosines(left, left).fill_diagonal_(-math.inf), 1, rows.start)
        for columns in blocks[i + 1 :]:
            tile = cosines(left, unit[columns])
            best.update(rows, tile, 1, columns.start)
            best.update(columns, tile, 0, rows.start)
    return best.result()


def _nearest_of_rows(unit: UnitRows, rows: Tensor) -> tuple[Tensor, Tensor]:
    c, d = unit.vectors.shape
    best = Best(rows.shape[0], unit.inverse)
    blocks = block_sizes(rows.shape[0], c, d, rows.device)
    for start, stop in spans(c, blocks.classes):
        right = unit[slice(start, stop)]
        for row in spans(rows.shape[0], blocks.rows):
            own = rows[slice(*row)]
            tile = unit[own] @ right.t()
            TargetColumn(own, start, stop - start).fill(tile, -math.inf)
            best.update(slice(*row), tile, 1, start)
    return best.result()


def nearest_prototype_gradient(grad_cosine: Tensor, prototypes: Tensor, rows: Tensor | None, index: Tensor) -> Tensor:
    """Gradient (C, D) along the found pairs only, deterministic also where several share one nearest prototype."""
    dtype = compute_dtype(prototypes)
    c, d = prototypes.shape
    unit = UnitRows(prototypes, dtype)
    own = torch.arange(c, device=prototypes.device) if rows is None else rows
    grad = torch.zeros(c, d, dtype=dtype, device=prototypes.device)
    has_nearest = index >= 0  # C = 1 has none
    near = torch.where(has_nearest, index, 0)
    weight = torch.where(has_nearest, grad_cosine, 0.0).to(dtype)
    for start, stop in spans(own.shape[0], max(1, (1 << 20) // max(1, d))):
        i, j, g = own[start:stop], near[start:stop], weight[start:stop, None]
        add_rows_(grad, i, g * unit[j])
        add_rows_(grad, j, g * unit[i])
    for start, stop in spans(c, max(1, (1 << 20) // max(1, d))):
        rows_here = slice(start, stop)
        project_(grad[rows_here], unit[rows_here], unit.inverse[rows_here])
    return grad.to(prototypes.dtype)


def top_k(features: Tensor, prototypes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See :func:`ltloss.functional.top_k`."""
    dtype = compute_dtype(features, prototypes)
    cosine, index = _largest(UnitRows(features, dtype), UnitRows(prototypes, dtype), k)
    return cosine.clamp_(-1.0, 1.0), _copies_in_order(prototypes, index)


@torch.no_grad()
def top_k_of_products(
    features: Tensor, prototypes: Tensor, k: int, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest x·w + b of each feature, the cosines of these classes, and their indices, (N, k) each."""
    with torch.autocast(features.device.type, enabled=False):  # no operator, which would see to it
        dtype = compute_dtype(features, prototypes)
        logit, index = _largest(Rows(features, dtype), Rows(prototypes, dtype), k, bias)
        unit, query = UnitRows(prototypes, dtype), UnitRows(features, dtype)
        cosine = torch.empty_like(logit)
        for start, stop in spans(len(index), max(1, (1 << 20) // (k * features.shape[1]))):
            rows = slice(start, stop)
            found = unit[index[rows].reshape(-1)].view(stop - start, k, -1)
            cosine[rows] = torch.linalg.vecdot(found, query[rows][:, None])
    return logit, cosine.clamp_(-1.0, 1.0), index


def _largest(query: Rows, classes: Rows, k: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k largest products of each row with those of the classes, plus a bias, and where they are; (N, k) each."""
    n, (c, d), device = query.vectors.shape[0], classes.vectors.shape, query.vectors.device
    cosine = torch.full((n, k), -math.inf, dtype=query.dtype, device=device)
    index = torch.full((n, k), -1, dtype=torch.int64, device=device)
    blocks = block_sizes(n, c, d, device)
    for start, stop in spans(c, blocks.classes):
        right = classes[slice(start, stop)]
        for row in spans(n, blocks.rows):
            tile = query[slice(*row)] @ right.t()
            if bias is not None:
                tile += bias[start:stop]
            best_cosine, best_index = cosine[slice(*row)], index[slice(*row)]
            # Only rows with something better than their k-th best so far; written so that NaN counts as better.
            rows = (~(tile.amax(1) <= best_cosine[:, -1])).nonzero()[:, 0]
            value, position = _first_top_k(tile[rows], min(k, stop - start))
            # Stable, and what was found before has the lower indices: equal cosines stay in class order.
            merged, order = torch.cat([best_cosine[rows], value], 1).sort(dim=1, descending=True, stable=True)
            found = torch.cat([best_index[rows], position + start], 1).gather(1, order)
            best_cosine[rows], best_index[rows] = merged[:, :k], found[:, :k]
    return cosine, index


def _copies_in_order(prototypes: Tensor, index: Tensor) -> Tensor:
    """Where m copies of a prototype are among the k best of a row, the m lowest of them, in ascending order."""
    copies = EqualRows(prototypes, index)
    if not copies.any:
        return index
    group = copies.group(index)
    # Which occurrence of its group in the row each entry is: its distance from the first one in sorted order.
    ordered, order = group.sort(dim=1, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    position = torch.arange(group.shape[1], device=group.device).expand_as(group)
    occurrence = position - torch.where(first, position, 0).cummax(1).values
    return copies.member(group, torch.empty_like(group).scatter_(1, order, occurrence))


def _first_top_k(tile: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``tile.topk(k)``, except that among equal values the lowest positions are taken, in ascending order."""
    value, position = tile.topk(k, dim=1)
    last = value[:, -1:]
    cut_through_tie = ((tile == last).sum(1) > (value == last).sum(1)).nonzero()[:, 0]
    if cut_through_tie.numel():
        sorted_value, sorted_position = tile[cut_through_tie].sort(dim=1, descending=True, stable=True)
        value[cut_through_tie], position[cut_through_tie] = sorted_value[:, :k], sorted_position[:, :k]
    position, order = position.sort(dim=1)
    value, order = value.gather(1, order).sort(dim=1, descending=True, stable=True)
    return value, position.gather(1, order)
