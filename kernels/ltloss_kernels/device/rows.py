"""Norms of whole rows, and copies of rows for the matrix unit where the rows themselves cannot be fed to it."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from ltloss_kernels.config import tile_table as tiles
from ltloss_kernels.device.elementary import LOG2E, scaled_rows, unit_rows

__all__ = ["row_norm_kernel", "row_norms"]


@triton.jit(do_not_specialize=["count", "padded", "flag_count"])
def row_norm_kernel(
    # inputs
    vectors_ptr,
    labels_ptr,
    prior_ptr,
    # outputs
    inverse_norm_ptr,
    factor_ptr,
    copy_ptr,
    prior_out_ptr,
    flags_ptr,
    # sizes
    count,
    width,
    padded,
    flag_count,
    vectors_row_stride,
    vectors_column_stride,
    labels_stride,
    copy_stride,
    ignore_index,
    factor_scale,
    # constants
    COPY: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
    CLEAR_FLAGS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """1/‖v‖ of every row, and whatever else has to be done once per row before the tiles are computed.

    vectors (count, width) any dtype and strides; labels (count,): rows labelled ``ignore_index`` are taken as zero
    (they may hold NaN); prior (count,) float32.
    inverse_norm (padded,) float32 1/‖v‖, 0 for zero rows and beyond ``count``.
    copy (count, width) in the dtype of the product: "unit" rows; "scaled", each row times a power of two, so that
    neither the cast nor the products leave the range; "plain", as they are; or "none".
    factor (padded,) float32: factor_scale/‖row‖ of the row that goes into the product, the scaled copy or the original;
    0 for zero rows and beyond ``count`` (if HAS_FACTOR). prior_out (padded,) prior·log2 e, -inf beyond ``count``.
    flags (flag_count,) set to 0. One program per ROWS rows; the flags are shared out evenly.
    """
    program = tl.program_id(0)
    rows = program * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = rows < count
    used = inside
    if HAS_LABELS:
        labels = tl.load(labels_ptr + rows.to(tl.int64) * labels_stride, mask=inside, other=0)
        used = inside & (labels != ignore_index)
    offsets = rows.to(tl.int64)[:, None] * vectors_row_stride + columns.to(tl.int64)[None, :] * vectors_column_stride
    cells = (columns < width)[None, :]
    values = tl.load(vectors_ptr + offsets, mask=used[:, None] & cells, other=0.0).to(tl.float32)
    scaled, power, inverse = scaled_rows(values)
    tl.store(inverse_norm_ptr + rows, inverse * power, mask=rows < padded)
    if COPY != "none":
        copied = values
        if COPY == "unit":
            copied = unit_rows(scaled, inverse)
        elif COPY == "scaled":
            copied = scaled
        copy_offsets = rows.to(tl.int64)[:, None] * copy_stride + columns[None, :]
        tl.store(copy_ptr + copy_offsets, copied.to(copy_ptr.dtype.element_ty), mask=inside[:, None] & cells)
    if HAS_FACTOR:
        factor = inverse if COPY == "scaled" else inverse * power
        tl.store(factor_ptr + rows, factor * factor_scale, mask=rows < padded)
    if HAS_PRIOR:
        prior = tl.load(prior_ptr + rows, mask=inside, other=float("-inf"))
        tl.store(prior_out_ptr + rows, prior * LOG2E, mask=rows < padded)
    if CLEAR_FLAGS:
        share = tl.cdiv(flag_count, tl.num_programs(0))
        cleared = tl.zeros((1024,), tl.int8)
        for start in range(program * share, tl.minimum((program + 1) * share, flag_count), 1024):
            cell = start + tl.arange(0, 1024)
            tl.store(flags_ptr + cell, cleared, mask=cell < tl.minimum((program + 1) * share, flag_count))


def row_norms(
    vectors: Tensor,
    inverse_norm: Tensor,
    *,
    factor: Tensor | None = None,
    factor_scale: float = 1.0,
    copy: Tensor | None = None,
    copy_as: Literal["unit", "scaled", "plain"] = "scaled",
    labels: Tensor | None = None,
    ignore_index: int = 0,
    prior: Tensor | None = None,
    prior_out: Tensor | None = None,
    flags: Tensor | None = None,
) -> None:
    """Launch :func:`row_norm_kernel`.

    Args:
        vectors: (K, D) any floating dtype, any strides.
        inverse_norm: (P,) float32, P >= K: written.
        factor, factor_scale: (P,) float32: ``factor_scale`` over the length of the rows that go into the product.
        copy, copy_as: (K, D) with columns next to each other, and what to write there.
        labels, ignore_index: (K,) integers; rows with the label ``ignore_index`` are taken as zero.
        prior, prior_out: (K,) and (P,) float32.
        flags: (F,) int8, cleared.
    """
    tile = tiles.row_tile(vectors.shape[1])
    padded = inverse_norm.shape[0]
    row_norm_kernel[(triton.cdiv(padded, tile.rows),)](
        # inputs
        vectors,
        labels,
        prior,
        # outputs
        inverse_norm,
        factor,
        copy,
        prior_out,
        flags,
        # sizes
        vectors.shape[0],
        vectors.shape[1],
        padded,
        0 if flags is None else flags.numel(),
        vectors.stride(0),
        vectors.stride(1),
        0 if labels is None else labels.stride(0),
        0 if copy is None else copy.stride(0),
        ignore_index,
        factor_scale,
        # constants
        COPY="none" if copy is None else copy_as,
        HAS_FACTOR=factor is not None,
        HAS_LABELS=labels is not None,
        HAS_PRIOR=prior is not None,
        CLEAR_FLAGS=flags is not None,
        ROWS=tile.rows,
        WIDTH=tile.width,
        num_warps=tile.warps,
    )
