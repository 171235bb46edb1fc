"""Backward of the nearest prototype: along the found pairs only, O(R·D), every sum in a fixed order.

A pair has two ends: entry p < pairs is the own end of pair p, and entry pairs + p its other end. The entries are sorted
by the class at their end, so each class has a stretch of the list. CHUNK entries are a chunk; the chunks of a class
start at its first entry. chunk_sum_kernel adds each chunk up in a program of its own. nearest_gradient_kernel has a
program for each class, which adds the class's chunk sums and the rest of its stretch, less than a chunk. So no program
has much more work than the others, however many classes share one neighbour.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from ltloss_kernels.device.elementary import scaled_rows, unit_rows

__all__ = ["chunk_sum_kernel", "nearest_gradient_kernel"]


@triton.jit
def _add_partners(
    total,
    prototypes_ptr,
    own_ptr,
    near_ptr,
    grad_cosine_ptr,
    order_ptr,
    first,
    end,
    pairs,
    width,
    row_stride,
    column_stride,
    grad_cosine_stride,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """total (1, WIDTH) + Σ grad·ŵ_partner over the entries [first, end), ENTRIES at a time."""
    columns = tl.arange(0, WIDTH)
    cells = (columns < width)[None, :]
    column_offsets = columns.to(tl.int64)[None, :] * column_stride
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
    return total


@triton.jit(do_not_specialize=["pairs"])
def chunk_sum_kernel(
    # inputs
    prototypes_ptr,
    own_ptr,
    near_ptr,
    grad_cosine_ptr,
    order_ptr,
    ends_ptr,
    starts_ptr,
    # outputs
    partial_ptr,
    # sizes
    pairs,
    width,
    row_stride,
    column_stride,
    grad_cosine_stride,
    # constants
    CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Σ grad·ŵ_partner over the chunk that starts in a window of CHUNK places of the list; one window per program.

    At most one chunk starts in a window, and the last place of the window then belongs to the chunk's class. So a class
    whose stretch starts at ``first`` has its chunks in the windows first // CHUNK, first // CHUNK + 1, ...

    ends (2·pairs,) int64: the class at each entry's end, ascending. partial (2·pairs // CHUNK, width) float32: receives
    the sum of each window's chunk; a window without a chunk is not written. The other arguments are those of
    :func:`nearest_gradient_kernel`.
    """
    window = tl.program_id(0).to(tl.int64)
    target = tl.load(ends_ptr + window * CHUNK + CHUNK - 1)
    first, end = tl.load(starts_ptr + target), tl.load(starts_ptr + target + 1)
    start = first + (window - first // CHUNK) * CHUNK
    if start + CHUNK <= end:
        total = _add_partners(
            tl.zeros((1, WIDTH), tl.float32),
            prototypes_ptr,
            own_ptr,
            near_ptr,
            grad_cosine_ptr,
            order_ptr,
            start,
            start + CHUNK,
            pairs,
            width,
            row_stride,
            column_stride,
            grad_cosine_stride,
            ENTRIES,
            WIDTH,
        )
        columns = tl.arange(0, WIDTH)[None, :]
        tl.store(partial_ptr + window * width + columns, total, mask=columns < width)


@triton.jit(do_not_specialize=["pairs"])
def nearest_gradient_kernel(
    # inputs
    prototypes_ptr,
    own_ptr,
    near_ptr,
    grad_cosine_ptr,
    order_ptr,
    starts_ptr,
    partial_ptr,
    # outputs
    grad_ptr,
    # sizes
    pairs,
    width,
    row_stride,
    column_stride,
    grad_cosine_stride,
    # constants
    CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dw_c = (g − (g·ŵ_c) ŵ_c)/‖w_c‖ with g = Σ grad·ŵ_partner over the pairs that c is in; one class per program.

    prototypes (classes, width): any dtype and strides. Pair p is (own[p], near[p]), both (pairs,) int64; own[p] is p if
    own is None. grad_cosine (pairs,): any stride.
    order (2·pairs,) int64: the entries, sorted by the class at their end. starts (classes + 1,) int64: where the
    stretch of each class begins. partial (2·pairs // CHUNK, width) float32: from chunk_sum_kernel.
    grad (classes, width): columns next to each other.
    """
    target = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    cells = (columns < width)[None, :]
    first, end = tl.load(starts_ptr + target), tl.load(starts_ptr + target + 1)
    chunks = (end - first) // CHUNK
    total = tl.zeros((1, WIDTH), tl.float32)
    for start in range(0, chunks, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        offsets = (first // CHUNK + at)[:, None] * width + columns[None, :]
        sums = tl.load(partial_ptr + offsets, mask=(at < chunks)[:, None] & cells, other=0.0)
        total += tl.sum(sums, 0)[None, :]
    total = _add_partners(
        total,
        prototypes_ptr,
        own_ptr,
        near_ptr,
        grad_cosine_ptr,
        order_ptr,
        first + chunks * CHUNK,
        end,
        pairs,
        width,
        row_stride,
        column_stride,
        grad_cosine_stride,
        ENTRIES,
        WIDTH,
    )
    column_offsets = columns.to(tl.int64)[None, :] * column_stride
    row = tl.load(prototypes_ptr + target * row_stride + column_offsets, mask=cells, other=0.0).to(tl.float32)
    row, power, inverse = scaled_rows(row)
    unit = unit_rows(row, inverse)
    total = (total - tl.sum(total * unit, 1)[:, None] * unit) * inverse[:, None] * power[:, None]
    out = grad_ptr + target * width + columns[None, :]
    tl.store(out, total.to(grad_ptr.dtype.element_ty), mask=cells)
