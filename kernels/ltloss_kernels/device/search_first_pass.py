"""Search without the matrix of cosines, first pass: the best tile of classes for every row.

The cosines of one row have the order of v_c = (x·w_c)/‖w_c‖, so the length of x is not needed. A tile leaves one 64-bit
key per row: the upper half is the largest v as bits that compare like an integer, the lower half the largest number
minus that of the tile. The largest key belongs to the largest v and, among equal ones, to the lowest tile. The maximum
of integers does not depend on their order, so the result has the same bits each time. The second pass
(:mod:`ltloss_kernels.device.search_second_pass`) finds the class within the tile.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from ltloss_kernels.device.tile_io import tile_product

__all__ = [
    "LAST_NUMBER",
    "LOWEST_KEY",
    "best_tile_kernel",
    "largest",
    "nearest_prototype_kernel",
    "number_of",
    "order_key",
]

# Less than the key of every value; a row that keeps it has no candidate.
LOWEST_KEY = -(1 << 63)
# The largest number that a key can hold; the lower half of a key is this minus the number.
LAST_NUMBER = 0x7FFFFFFF

_LAST = tl.constexpr(LAST_NUMBER)
_LOWEST = tl.constexpr(LOWEST_KEY)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(values, AXIS: tl.constexpr):
    """Maximum along an axis; NaN if any value is (``tl.max`` would drop it), at the same cost."""
    return tl.reduce(values, AXIS, _larger)


@triton.jit
def order_key(value, number):
    """An int64 key: larger for a larger float32, NaN being the largest; of equal ones, larger for a smaller number."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 = +0: both zeros are equal
    ordered = tl.where(value == value, bits ^ ((bits >> 31) & _LAST), _LAST)
    return (ordered.to(tl.int64) << 32) + _LAST - number


@triton.jit
def number_of(key):
    """The number (int32) in a key."""
    return ((key & _LAST) ^ _LAST).to(tl.int32)


@triton.jit
def triangle_tile(tiles, GROUP: tl.constexpr):
    """(row block, tile) of this program: each tile on or above the diagonal of (tiles, tiles) belongs to one program.

    GROUP x GROUP tiles form a square, so that programs at work at one time share rows and columns in the second-level
    cache. The squares of the triangle are folded into a rectangle: of G rows of squares, row y has G - y and row
    G - 1 - y has y + 1, together G + 1. A program without a tile gets a row block greater than its tile.
    """
    squares = tl.cdiv(tiles, GROUP)
    inside = tl.program_id(0) % (GROUP * GROUP)
    x, y = tl.program_id(0) // (GROUP * GROUP), tl.program_id(1)
    folded = x >= squares - y
    across = tl.where(folded, squares - 1 - y, y)
    along = tl.where(folded, x - 1, y + x)
    block, tile = across * GROUP + inside % GROUP, along * GROUP + inside // GROUP
    alone = folded & (2 * y == squares - 1)  # the middle row of an odd number has no partner
    return tl.where((tile >= tiles) | alone, tile + 1, block), tile


@triton.jit(do_not_specialize=["classes", "tiles"])
def nearest_prototype_kernel(
    # inputs
    rows_source,
    prototypes,
    inverse_norm_ptr,
    # outputs
    best_ptr,
    # sizes
    classes,
    width,
    tiles,
    prototypes_stride,
    # constants
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """For every prototype the tile that holds its nearest other one; one square tile of the triangle per program.

    rows_source, prototypes (classes, width): the same matrix, descriptors if DESCRIBED. inverse_norm
    (tiles · BLOCK_CLASSES,) float32: 1/‖w‖ of the rows of that matrix, 0 beyond the classes.
    best (classes,) int64: receives the largest :func:`order_key` of each class; must hold LOWEST_KEY before.

    A tile off the diagonal serves both its rows and its columns. Both compute (w_i·w_j)·(1/‖w_j‖) for candidate j, so
    that no result depends on the side of the diagonal on which a pair is.
    """
    block, tile = triangle_tile(tiles, GROUP)
    if block <= tile:
        product, _ = tile_product(
            rows_source, prototypes, block, tile, classes, classes, width, prototypes_stride, prototypes_stride,
            DESCRIBED, PRECISION, BLOCK_ROWS, BLOCK_CLASSES, BLOCK_DEPTH,
        )  # fmt: skip
        rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        here = tile * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
        # The columns first: their scaled products are then dead, which saves registers.
        mirrored = largest(product * tl.load(inverse_norm_ptr + rows)[:, None], 0)
        tl.atomic_max(
            best_ptr + here, order_key(mirrored, block), mask=(here < classes) & (block < tile), sem="relaxed"
        )
        value = product * tl.load(inverse_norm_ptr + here)[None, :]
        if (block == tile) | (tile == tiles - 1):  # the latter may reach beyond the classes
            hidden = (here[None, :] == rows[:, None]) | (here >= classes)[None, :]
            value = tl.where(hidden, float("-inf"), value)
        tl.atomic_max(best_ptr + rows, order_key(largest(value, 1), tile), mask=rows < classes, sem="relaxed")


@triton.jit(do_not_specialize=["count", "classes", "tiles", "tiles_per_split"])
def best_tile_kernel(
    # inputs
    rows_source,
    prototypes,
    inverse_norm_ptr,
    own_ptr,
    # outputs
    best_ptr,
    # sizes
    count,
    classes,
    width,
    tiles,
    tiles_per_split,
    rows_stride,
    prototypes_stride,
    # constants
    EVERY_TILE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """For any rows, the best tile by the largest (x_i·w_c)/‖w_c‖; a row block by a range of tiles per program.

    rows_source (count, width), prototypes (classes, width): descriptors if DESCRIBED. inverse_norm
    (tiles · BLOCK_CLASSES,) float32: 1/‖w‖ of the rows of ``prototypes`` as they are given. own (count,) int64: the
    class that each row leaves out, or None.
    best (count,) int64: receives the largest :func:`order_key` of each row; must hold LOWEST_KEY before. If EVERY_TILE,
    best (count, tiles) receives the key of every tile.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < count
    if own_ptr is not None:
        own = tl.load(own_ptr + rows, mask=inside, other=-1).to(tl.int32)
    best = tl.full((BLOCK_ROWS,), _LOWEST, tl.int64)
    end = tl.minimum((split + 1) * tiles_per_split, tiles)
    for tile in tl.range(split * tiles_per_split, end, flatten=True):
        product, _ = tile_product(
            rows_source, prototypes, block, tile, count, classes, width, rows_stride, prototypes_stride,
            DESCRIBED, PRECISION, BLOCK_ROWS, BLOCK_CLASSES, BLOCK_DEPTH,
        )  # fmt: skip
        here = tile * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
        value = product * tl.load(inverse_norm_ptr + here)[None, :]
        hides = tile == tiles - 1  # it may reach beyond the classes
        if own_ptr is not None:
            hides |= tl.max((own // BLOCK_CLASSES == tile).to(tl.int32), 0) != 0
        if hides:
            hidden = (here >= classes)[None, :]
            if own_ptr is not None:
                hidden |= here[None, :] == own[:, None]
            value = tl.where(hidden, float("-inf"), value)
        key = order_key(largest(value, 1), tile)
        if EVERY_TILE:
            tl.store(best_ptr + rows.to(tl.int64) * tiles + tile, key, mask=inside)
        else:
            best = tl.maximum(best, key)
    if not EVERY_TILE:
        tl.atomic_max(best_ptr + rows, best, mask=inside, sem="relaxed")
