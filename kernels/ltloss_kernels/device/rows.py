"""Norms of whole rows, and copies of rows that the matrix products cannot read in place."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from ltloss_kernels.device.elementary import LOG2E, multiple, scaled_rows

__all__ = ["row_norm_kernel"]


@triton.jit(do_not_specialize=["count", "padded", "flag_count"])
def row_norm_kernel(
    # inputs
    vectors_ptr,
    prior_ptr,
    # outputs
    factor_ptr,
    copy_ptr,
    copy_factor_ptr,
    prior_out_ptr,
    flags_ptr,
    # sizes
    count,
    width,
    padded,
    flag_count,
    vectors_row_stride,
    vectors_column_stride,
    copy_stride,
    factor_scale,
    # constants
    NORMALIZE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """factor_scale/‖v‖ of every row, and other work once per row before the tiles; one program per ROWS rows.

    Inputs:
        vectors (count, width): any dtype and strides. UNIT divides width and the strides of rows.
        prior (count,) float32, or None.
    Outputs, each of which may be None:
        factor (padded,) float32: factor_scale/‖v‖; 0 for zero rows and beyond ``count``.
        copy (count, width) in the dtype of the product: each row times a power of two, so that neither the cast nor
            the products leave the range; zeros from ``width`` to copy_stride.
        copy_factor (padded,) float32: factor_scale over the length of the copied row.
        prior_out (padded,): prior·log2 e, -inf beyond ``count``.
        flags (flag_count,) int8: set to 0; the programs share them evenly.
    Without NORMALIZE each row of the vectors counts as of length 1: its factor is factor_scale.
    """
    program = tl.program_id(0)
    width, copy_stride = multiple(width, UNIT), multiple(copy_stride, UNIT)
    vectors_row_stride = multiple(vectors_row_stride, UNIT)
    rows = program * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = rows < count
    offsets = rows.to(tl.int64)[:, None] * vectors_row_stride + columns.to(tl.int64)[None, :] * vectors_column_stride
    cells = (columns < width)[None, :]
    values = tl.load(vectors_ptr + offsets, mask=inside[:, None] & cells, other=0.0).to(tl.float32)
    scaled, power, inverse = scaled_rows(values)
    if not NORMALIZE:
        inverse = tl.where(inside, 1.0 / power, 0.0)
    if factor_ptr is not None:
        tl.store(factor_ptr + rows, inverse * power * factor_scale, mask=rows < padded)
    if copy_ptr is not None:
        copy_offsets = rows.to(tl.int64)[:, None] * copy_stride + columns[None, :]
        whole = inside[:, None] & (columns < copy_stride)[None, :]
        tl.store(copy_ptr + copy_offsets, scaled.to(copy_ptr.dtype.element_ty), mask=whole)
        tl.store(copy_factor_ptr + rows, inverse * factor_scale, mask=rows < padded)
    if prior_ptr is not None:
        prior = tl.load(prior_ptr + rows, mask=inside, other=float("-inf"))
        tl.store(prior_out_ptr + rows, prior * LOG2E, mask=rows < padded)
    if flags_ptr is not None:
        share = tl.cdiv(flag_count, tl.num_programs(0))
        cleared = tl.zeros((1024,), tl.int8)
        for start in range(program * share, tl.minimum((program + 1) * share, flag_count), 1024):
            cell = start + tl.arange(0, 1024)
            tl.store(flags_ptr + cell, cleared, mask=cell < tl.minimum((program + 1) * share, flag_count))
