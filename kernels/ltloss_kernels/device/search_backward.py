"""Backward of the nearest prototype: along the found pairs only, O(R·D), every sum in one order."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from ltloss_kernels.device.elementary import scaled_rows, unit_rows

__all__ = ["nearest_gradient_kernel"]


@triton.jit(do_not_specialize=["pairs"])
def nearest_gradient_kernel(
    # inputs
    prototypes_ptr,
    own_ptr,
    near_ptr,
    grad_cosine_ptr,
    order_ptr,
    starts_ptr,
    # outputs
    grad_ptr,
    # sizes
    pairs,
    width,
    row_stride,
    column_stride,
    grad_cosine_stride,
    # constants
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dw_c = (g − (g·ŵ_c) ŵ_c)/‖w_c‖ with g = Σ grad·ŵ_partner over the pairs that c is in; one class per program.

    prototypes (classes, width): any dtype and strides. Pair p is (own_p, near_p), both (pairs,) int64, own_p = p if
    own is None; grad_cosine (pairs,), strided. Entry p < pairs stands for the own end of pair p, pairs + p for the
    other one: order (2·pairs,) int64 are the entries sorted by the class at their end, starts (classes + 1,) int64
    where each class begins. grad (classes, width): columns next to each other.
    """
    target = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    cells = (columns < width)[None, :]
    column_offsets = columns.to(tl.int64)[None, :] * column_stride
    first, end = tl.load(starts_ptr + target), tl.load(starts_ptr + target + 1)
    total = tl.zeros((1, WIDTH), tl.float32)
    for start in range(first, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        inside = at < end
        entry = tl.load(order_ptr + at, mask=inside, other=0)
        is_own = entry < pairs
        pair = tl.where(is_own, entry, entry - pairs)
        partner = tl.load(near_ptr + pair, mask=inside & is_own, other=0)
        if own_ptr is not None:
            partner = tl.where(is_own, partner, tl.load(own_ptr + pair, mask=inside & ~is_own, other=0))
        else:
            partner = tl.where(is_own, partner, pair)
        weight = tl.load(grad_cosine_ptr + pair * grad_cosine_stride, mask=inside, other=0.0).to(tl.float32)
        offsets = partner[:, None] * row_stride + column_offsets
        rows = tl.load(prototypes_ptr + offsets, mask=inside[:, None] & cells, other=0.0).to(tl.float32)
        rows, _, inverse = scaled_rows(rows)
        total += tl.sum(rows * (inverse * weight)[:, None], 0)[None, :]
    row = tl.load(prototypes_ptr + target * row_stride + column_offsets, mask=cells, other=0.0).to(tl.float32)
    row, power, inverse = scaled_rows(row)
    unit = unit_rows(row, inverse)
    total = (total - tl.sum(total * unit, 1)[:, None] * unit) * inverse[:, None] * power[:, None]
    out = grad_ptr + target * width + columns[None, :]
    tl.store(out, total.to(grad_ptr.dtype.element_ty), mask=cells)
