"""Search, second pass: the best classes within the tiles found, and their cosines from the original rows.

The first pass leaves (row, tile) pairs. They are sorted by tile, so that one program multiplies a block of gathered
rows with few tiles, and the second pass reads each row and each tile about once. The order within a tile is that of
arrival, which changes no result: what a pair gets depends on its own row only.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from ltloss_kernels.device.elementary import scaled_rows
from ltloss_kernels.device.search_first_pass import largest, number_of, order_key

__all__ = ["arrange_pairs_kernel", "count_tiles_kernel", "pair_cosine_kernel", "tile_candidates_kernel"]

_NO_TILE = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=["pairs"])
def count_tiles_kernel(best_ptr, counts_ptr, pairs, BLOCK: tl.constexpr):
    """Count the pairs of each tile: best (pairs,) int64 keys; counts (tiles,) int32, which must be 0 before."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    tile = number_of(tl.load(best_ptr + pair, mask=inside, other=0))
    tl.atomic_add(counts_ptr + tile, 1, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["pairs"])
def arrange_pairs_kernel(best_ptr, next_ptr, order_ptr, pairs, BLOCK: tl.constexpr):
    """Sort the pairs by tile: best (pairs,) int64 keys; order (pairs,) int32 receives the numbers of the pairs.

    next (tiles,) int32: the place of the first pair of each tile; afterwards, the place behind its last.
    """
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    tile = number_of(tl.load(best_ptr + pair, mask=inside, other=0))
    place = tl.atomic_add(next_ptr + tile, 1, mask=inside, sem="relaxed")
    tl.store(order_ptr + place, pair.to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["pairs", "pairs_per_row", "classes"])
def tile_candidates_kernel(
    # inputs
    rows_ptr,
    prototypes_ptr,
    inverse_norm_ptr,
    own_ptr,
    best_ptr,
    order_ptr,
    # outputs
    index_ptr,
    candidates_ptr,
    # sizes
    pairs,
    pairs_per_row,
    classes,
    width,
    rows_stride,
    prototypes_stride,
    # constants
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Multiply the row of each pair with the classes of its tile; BLOCK_ROWS pairs per program.

    rows (any, width), prototypes (classes, width): columns next to each other. inverse_norm (classes,) float32: 1/‖w‖
    of the rows of ``prototypes``. best (pairs,) int64: keys that hold the tile. order (pairs,) int32: see
    arrange_pairs_kernel.

    With index (pairs,) int64, the row of a pair is a prototype: number own (pairs,) int64, or the number of the pair if
    own is None. That class is left out, and index receives the nearest class of the tile, the lowest of equal ones.

    If index is None, pair p has row p // pairs_per_row, and candidates (pairs, BLOCK_CLASSES) int64 receives the
    :func:`order_key` of every class, that of -inf beyond the classes.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = at < pairs
    pair = tl.load(order_ptr + at, mask=inside, other=0).to(tl.int64)
    wanted = tl.where(inside, number_of(tl.load(best_ptr + pair, mask=inside, other=0)), _NO_TILE)
    row = pair // pairs_per_row
    if own_ptr is not None:
        row = tl.load(own_ptr + pair, mask=inside, other=0).to(tl.int64)
    row_pointers = rows_ptr + row[:, None] * rows_stride
    depth = tl.arange(0, BLOCK_DEPTH)
    tile = tl.min(wanted, 0)
    while tile != _NO_TILE:
        mine = wanted == tile
        here = tile * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
        known = here < classes
        class_pointers = prototypes_ptr + here.to(tl.int64)[:, None] * prototypes_stride
        product = tl.zeros((BLOCK_ROWS, BLOCK_CLASSES), tl.float32)
        for k in range(0, width, BLOCK_DEPTH):
            cells = (k + depth < width)[None, :]
            x = tl.load(row_pointers + (k + depth)[None, :], mask=mine[:, None] & cells, other=0.0)
            w = tl.load(class_pointers + (k + depth)[None, :], mask=known[:, None] & cells, other=0.0)
            product = tl.dot(x, w.T, product, input_precision=PRECISION)
        value = product * tl.load(inverse_norm_ptr + here, mask=known, other=0.0)[None, :]
        hidden = (here >= classes)[None, :]
        if index_ptr is not None:
            hidden |= here[None, :] == row[:, None]
        value = tl.where(hidden, float("-inf"), value)
        if index_ptr is not None:
            most = largest(value, 1)[:, None]
            found = (value == most) | (value != value)
            index = tl.min(tl.where(found & ~hidden, here[None, :], _NO_TILE), 1)
            tl.store(index_ptr + pair, index.to(tl.int64), mask=mine)
        else:
            cell = candidates_ptr + pair[:, None] * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)[None, :]
            tl.store(cell, order_key(value, here[None, :]), mask=mine[:, None])
        tile = tl.min(tl.where(wanted > tile, wanted, _NO_TILE), 0)


@triton.jit(do_not_specialize=["pairs", "pairs_per_row"])
def pair_cosine_kernel(
    # inputs
    left_ptr,
    right_ptr,
    own_ptr,
    index_ptr,
    # outputs
    cosine_ptr,
    # sizes
    pairs,
    pairs_per_row,
    width,
    left_row_stride,
    left_column_stride,
    right_row_stride,
    right_column_stride,
    # constants
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The cosine of every pair from the original rows, in [-1, 1]; NaN where a row holds NaN or infinity.

    left (any, width), right (classes, width): any dtype and strides. Pair p has left row own[p], own (pairs,) int64, or
    p // pairs_per_row if own is None; its right row is index[p], index (pairs,) int64.
    cosine (pairs,) float32.
    """
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = pair < pairs
    row = pair // pairs_per_row
    if own_ptr is not None:
        row = tl.load(own_ptr + pair, mask=inside, other=0).to(tl.int64)
    other = tl.load(index_ptr + pair, mask=inside, other=0)
    columns = tl.arange(0, WIDTH).to(tl.int64)[None, :]
    cells = inside[:, None] & (columns < width)
    x = tl.load(left_ptr + row[:, None] * left_row_stride + columns * left_column_stride, mask=cells, other=0.0)
    w = tl.load(right_ptr + other[:, None] * right_row_stride + columns * right_column_stride, mask=cells, other=0.0)
    x, _, x_inverse = scaled_rows(x.to(tl.float32))
    w, _, w_inverse = scaled_rows(w.to(tl.float32))
    cosine = tl.sum(x * w, 1) * x_inverse * w_inverse
    cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))  # comparisons keep NaN
    tl.store(cosine_ptr + pair, cosine, mask=inside)
