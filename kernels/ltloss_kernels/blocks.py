"""Blocks of a matrix in memory, by the copy engine (TMA, from Hopper on) or by addresses."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["load_block", "store_block"]


@triton.jit
def load_block(
    source, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIBED: tl.constexpr
):
    """The block (ROWS, COLUMNS) at (row, column) of a matrix (rows, columns), 0 beyond it.

    ``source`` is a descriptor with that block shape if DESCRIBED, which knows the sizes itself; else a pointer to rows
    that are ``stride`` apart, columns next to each other.
    """
    if DESCRIBED:
        block = source.load([row, column])
    else:
        at_row = row + tl.arange(0, ROWS)
        at_column = column + tl.arange(0, COLUMNS)
        pointers = source + at_row.to(tl.int64)[:, None] * stride + at_column[None, :]
        block = tl.load(pointers, mask=(at_row < rows)[:, None] & (at_column < columns)[None, :], other=0.0)
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
):
    """Write a block to where :func:`load_block` would read it; what lies beyond the matrix is left out."""
    if DESCRIBED:
        target.store([row, column], block.to(target.dtype))
    else:
        at_row = row + tl.arange(0, ROWS)
        at_column = column + tl.arange(0, COLUMNS)
        pointers = target + at_row.to(tl.int64)[:, None] * stride + at_column[None, :]
        inside = (at_row < rows)[:, None] & (at_column < columns)[None, :]
        tl.store(pointers, block.to(target.dtype.element_ty), mask=inside)
