"""Blocks of a matrix in memory, by the copy engine (TMA, from Hopper on) or by addresses."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from ltloss_kernels.device.elementary import TINY, power_of_two_below

__all__ = ["holds_a_label", "inverse_lengths", "load_block", "store_block", "tile_product"]

# A float32 sum of squares between these has neither overflowed nor lost a term that matters to underflow.
LEAST_SQUARES = tl.constexpr(2.0**-80)
MOST_SQUARES = tl.constexpr(2.0**120)


@triton.jit
def holds_a_label(label, column, COLUMNS: tl.constexpr):
    """Whether one of the labels (R,) is among the COLUMNS classes from ``column`` on."""
    return tl.max(((label >= column) & (label < column + COLUMNS)).to(tl.int32), 0) != 0


@triton.jit
def addresses(
    matrix, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr
):
    """Pointers to a block (ROWS, COLUMNS), and a mask of those inside the matrix, whose rows are padded to whole UNITs.

    Rows are ``stride`` apart, a multiple of UNIT, so that the compiler moves UNIT entries at once.
    """
    at_row = row + tl.arange(0, ROWS)
    at_column = tl.arange(0, COLUMNS)
    pointers = matrix + at_row.to(tl.int64)[:, None] * (stride // UNIT * UNIT) + (column + at_column)[None, :]
    return pointers, (at_row < rows)[:, None] & (column + at_column // UNIT * UNIT < columns)[None, :]


@triton.jit
def load_block(
    source, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIBED: tl.constexpr
):
    """The block (ROWS, COLUMNS) at (row, column) of a matrix (rows, columns), 0 beyond the matrix.

    If DESCRIBED, ``source`` is a descriptor of that block shape, which knows the sizes of the matrix. Else it is a
    pointer to rows that are ``stride`` apart, with columns next to each other. These rows are padded to whole 16 bytes,
    and the padding is read too.
    """
    if DESCRIBED:
        block = source.load([row, column])
    else:
        UNIT: tl.constexpr = 128 // source.dtype.element_ty.primitive_bitwidth
        pointers, inside = addresses(source, row, column, rows, columns, stride, ROWS, COLUMNS, UNIT)
        block = tl.load(pointers, mask=inside, other=0.0)
    return block


@triton.jit
def store_block(
    target,
    block,
    row,
    column,
    rows,
    columns,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    FILLED: tl.constexpr,
):
    """Write a block to where :func:`load_block` would read it; entries beyond the matrix are dropped.

    FILLED: rows are padded to whole 16 bytes, and anything may be written to the padding. This is not used for float32:
    it would take 12 more registers on sm_80, and one block would fit a multiprocessor instead of two.
    """
    if DESCRIBED:
        target.store([row, column], block.to(target.dtype))
    else:
        UNIT: tl.constexpr = 8 if FILLED and target.dtype.element_ty.primitive_bitwidth == 16 else 1
        pointers, inside = addresses(target, row, column, rows, columns, stride, ROWS, COLUMNS, UNIT)
        tl.store(pointers, block.to(target.dtype.element_ty), mask=inside)


@triton.jit
def multiplied(x, w, product, squares, PRECISION: tl.constexpr, SQUARES: tl.constexpr):
    """Add x·wᵀ to a product, and w·w of each row of w to the squares if SQUARES.

    w is cast to the dtype of x, which has the range for it.
    """
    product = tl.dot(x, w.to(x.dtype).T, product, input_precision=PRECISION)
    if SQUARES:
        wide = w.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
    return product, squares


@triton.jit
def tile_product(
    rows_source,
    classes_source,
    block,
    tile,
    count,
    classes,
    width,
    rows_stride,
    classes_stride,
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    SQUARES: tl.constexpr = False,
    resident=None,
    first_column=0,
):
    """x·wᵀ of row block ``block`` and class tile ``tile``, and w·w of each class if SQUARES, both float32.

    The matrices have ``count`` and ``classes`` rows; w has ``width`` columns from ``first_column`` on. ``resident`` is
    the row block, if it was loaded before and BLOCK_DEPTH covers all its columns; else None.
    Returns (BLOCK_ROWS, BLOCK_CLASSES) and (BLOCK_CLASSES,); the latter is 0 without SQUARES.
    """
    tl.assume(width > 0)  # else a flattened loop around it has a second body, for products of no columns
    product = tl.zeros((BLOCK_ROWS, BLOCK_CLASSES), tl.float32)
    squares = tl.zeros((BLOCK_CLASSES,), tl.float32)
    if resident is not None:
        w = load_block(
            classes_source, tile * BLOCK_CLASSES, first_column, classes, first_column + width, classes_stride,
            BLOCK_CLASSES, BLOCK_DEPTH, DESCRIBED,
        )  # fmt: skip
        return multiplied(resident, w, product, squares, PRECISION, SQUARES)
    for k in range(0, width, BLOCK_DEPTH):
        x = load_block(
            rows_source, block * BLOCK_ROWS, k, count, width, rows_stride, BLOCK_ROWS, BLOCK_DEPTH, DESCRIBED
        )
        w = load_block(
            classes_source, tile * BLOCK_CLASSES, first_column + k, classes, first_column + width, classes_stride,
            BLOCK_CLASSES, BLOCK_DEPTH, DESCRIBED,
        )  # fmt: skip
        product, squares = multiplied(x, w, product, squares, PRECISION, SQUARES)
    return product, squares


@triton.jit
def inverse_lengths(
    squares,
    classes_source,
    tile,
    classes,
    width,
    classes_stride,
    DESCRIBED: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """1/‖w‖ of each class of a tile from its w·w, both (BLOCK_CLASSES,); 0 for a zero row and beyond the classes.

    Where a sum of squares is too small or too large for float32, the tile is read again and its rows are scaled first.
    """
    one = tl.full(squares.shape, 1.0, tl.float32)
    known = tile * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES) < classes
    in_range = (squares >= LEAST_SQUARES) & (squares <= MOST_SQUARES)
    inverse = tl.div_rn(one, tl.sqrt_rn(tl.where(in_range, squares, 1.0)))
    if tl.max((known & ~in_range).to(tl.int32), 0) != 0:
        largest = tl.zeros((BLOCK_CLASSES,), tl.float32)
        for k in range(0, width, BLOCK_DEPTH):
            w = load_block(
                classes_source, tile * BLOCK_CLASSES, k, classes, width, classes_stride, BLOCK_CLASSES, BLOCK_DEPTH,
                DESCRIBED,
            )  # fmt: skip
            largest = tl.maximum(largest, tl.max(tl.abs(w.to(tl.float32)), 1))
        power = power_of_two_below(largest)
        squares = tl.zeros((BLOCK_CLASSES,), tl.float32)
        for k in range(0, width, BLOCK_DEPTH):
            w = load_block(
                classes_source, tile * BLOCK_CLASSES, k, classes, width, classes_stride, BLOCK_CLASSES, BLOCK_DEPTH,
                DESCRIBED,
            )  # fmt: skip
            scaled = w.to(tl.float32) * power[:, None]
            squares += tl.sum(scaled * scaled, 1)
        zero = largest < TINY
        inverse = tl.where(zero, 0.0, tl.div_rn(one, tl.sqrt_rn(tl.where(zero, 1.0, squares))) * power)
    return tl.where(known, inverse, 0.0)
