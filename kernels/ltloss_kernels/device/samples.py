"""The data of each sample for the forward's tiles and the margin: its copy, length, targets and target cosines."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from ltloss_kernels.device.elementary import exact_cosine, exact_product, scaled_rows, unit_rows

__all__ = ["sample_kernel"]


@triton.jit
def target_cosines(
    x, x_power, x_inverse, prototypes_ptr, target, columns, cells, row_stride, column_stride,
    NORMALIZE_FEATURES: tl.constexpr, NORMALIZE_PROTOTYPES: tl.constexpr, SUB_CENTERS: tl.constexpr,
):  # fmt: skip
    """The largest x̂·ŵ (R,) over the SUB_CENTERS prototypes from row ``target`` (R,) on.

    x, x_power and x_inverse are as :func:`scaled_rows` returns them. Without NORMALIZE_PROTOTYPES the result is x̂·w,
    or x·w if NORMALIZE_FEATURES is off as well.
    """
    cosine = tl.full(target.shape, float("-inf"), tl.float32)
    for k in tl.static_range(SUB_CENTERS):
        offsets = (target + k)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
        w = tl.load(prototypes_ptr + offsets, mask=cells, other=0.0).to(tl.float32)
        w, w_power, w_inverse = scaled_rows(w)
        if NORMALIZE_PROTOTYPES:
            found = tl.where(x_inverse * w_inverse == 0.0, 0.0, exact_cosine(x, w))
        else:  # one factor at a time: each of them is in range
            found = exact_product(x, w) * (x_inverse if NORMALIZE_FEATURES else 1.0 / x_power) * (1.0 / w_power)
        cosine = tl.maximum(cosine, found, propagate_nan=tl.PropagateNan.ALL)
    return cosine


@triton.jit(do_not_specialize=["samples", "classes", "class_tiles"])
def sample_kernel(
    # inputs
    features_ptr,
    prototypes_ptr,
    labels_ptr,
    # outputs
    copy_ptr,
    norm_ptr,
    target_cosine_ptr,
    label_ptr,
    flags_ptr,
    # sizes
    samples,
    classes,
    width,
    class_tiles,
    features_row_stride,
    features_column_stride,
    prototypes_row_stride,
    prototypes_column_stride,
    labels_stride,
    copy_stride,
    labels_column_stride,
    target_stride,
    ignore_index,
    # constants
    NORMALIZE_FEATURES: tl.constexpr,
    NORMALIZE_PROTOTYPES: tl.constexpr,
    RAGGED: tl.constexpr,
    FLAG_ROWS: tl.constexpr,
    FLAG_CLASSES: tl.constexpr,
    SUB_CENTERS: tl.constexpr,
    TARGETS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Copy, length, labels and target cosines of each sample, and the flags of the tiles that hold a target.

    Inputs, of any dtype and strides:
        features (samples, width), prototypes (classes · SUB_CENTERS, width), labels (samples, TARGETS).
    Outputs; copy, norm and flags may be None:
        copy (samples, width) in the dtype of the product: unit rows if NORMALIZE_FEATURES, else the rows as they are;
            zeros from ``width`` to copy_stride.
        norm (samples,): ‖x‖.
        target_cosine (TARGETS, samples), rows target_stride apart: x̂·ŵ of the target's nearest sub-centre, from the
            original rows, rounded to float32 once; see target_cosines for lengths that are kept. 0 for the label
            ``ignore_index``, NaN for another label outside [0, classes). If ``ignore_index`` is None, a label outside
            has no target here, and the cosine is 0.
        label (TARGETS, samples) int32: the class, or -1.
        flags (row blocks, class_tiles) int8, cleared before: 1 where a tile holds the target of one of its rows; if
            RAGGED also in the last column, whose tile reaches beyond the classes. Several rows may write the same 1.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = rows < samples
    cells = (columns < width)[None, :]
    offsets = rows.to(tl.int64)[:, None] * features_row_stride + columns.to(tl.int64)[None, :] * features_column_stride
    values = tl.load(features_ptr + offsets, mask=inside[:, None] & cells, other=0.0).to(tl.float32)
    x, x_power, x_inverse = scaled_rows(values)
    if copy_ptr is not None:
        copied = unit_rows(x, x_inverse) if NORMALIZE_FEATURES else values
        copy_cells = copy_ptr + rows.to(tl.int64)[:, None] * copy_stride + columns[None, :]
        whole = inside[:, None] & (columns < tl.cast(copy_stride, tl.int64))[None, :]
        tl.store(copy_cells, copied.to(copy_ptr.dtype.element_ty), mask=whole)
    for place in tl.static_range(TARGETS):
        at = labels_ptr + rows.to(tl.int64) * labels_stride + place * labels_column_stride
        label = tl.load(at, mask=inside, other=-1).to(tl.int64)
        valid = inside & (label >= 0) & (label < classes)
        missing = tl.zeros((ROWS,), tl.float32)
        if ignore_index is not None:
            valid = valid & (label != ignore_index)
            missing = tl.where(label == ignore_index, 0.0, float("nan"))
        target = tl.where(valid, label, 0)
        cosine = target_cosines(
            x, x_power, x_inverse, prototypes_ptr, target * SUB_CENTERS, columns, valid[:, None] & cells,
            prototypes_row_stride, prototypes_column_stride, NORMALIZE_FEATURES, NORMALIZE_PROTOTYPES, SUB_CENTERS,
        )  # fmt: skip
        tl.store(target_cosine_ptr + place * target_stride + rows, tl.where(valid, cosine, missing), mask=inside)
        cell = label_ptr + place * samples.to(tl.int64) + rows
        tl.store(cell, tl.where(valid, label, -1).to(tl.int32), mask=inside)
        if flags_ptr is not None:
            flag_row = (rows // FLAG_ROWS).to(tl.int64) * class_tiles
            one = tl.full((ROWS,), 1, tl.int8)
            tl.store(flags_ptr + flag_row + target // FLAG_CLASSES, one, mask=valid)
            if RAGGED:
                tl.store(flags_ptr + flag_row + class_tiles - 1, one, mask=inside & (rows % FLAG_ROWS == 0))
    if norm_ptr is not None:
        norm = tl.sqrt_rn(tl.sum(x * x, 1))
        tl.store(norm_ptr + rows, tl.div_rn(norm, x_power), mask=inside)
