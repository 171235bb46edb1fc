"""Forward: log-sum-exp of the cosine logits over the other classes, and the own-class cosine.

With l_ic = s·cos_ic + b_c, in units of log 2 throughout the tiles: l·log2 e = (x̂_i·w_c)·(s·log2 e/‖w_c‖) + b_c·log2 e.
Unit features are a small copy, rounded as plain PyTorch would round them; prototypes go into the product as they are,
and their lengths enter behind it, in float32: one multiply-add per element.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from ltloss_kernels.device.elementary import LN2, log, scaled_rows, unit_rows
from ltloss_kernels.device.tile_io import tile_product

__all__ = ["combine_kernel", "combine_splits", "cosine_logsumexp_kernel", "sample_kernel"]


@triton.jit(do_not_specialize=["samples", "classes", "class_tiles"])
def sample_kernel(
    # inputs
    features_ptr,
    prototypes_ptr,
    labels_ptr,
    # outputs
    copy_ptr,
    inverse_norm_ptr,
    length_ptr,
    own_cosine_ptr,
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
    ignore_index,
    # constants
    SUPERVISED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_COPY: tl.constexpr,
    RAGGED: tl.constexpr,
    FLAG_ROWS: tl.constexpr,
    FLAG_CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """What the tiles and the margin need of each sample.

    features (samples, width), prototypes (classes, width), labels (samples,): any dtype and strides.
    copy (samples, width), in the dtype of the product: unit rows if NORMALIZE, else the rows as they are (if HAS_COPY).
    inverse_norm (samples,) 1/‖x‖; length (samples,) ‖x‖ unless NORMALIZE.
    own_cosine (samples,): in float32 from the original rows, 0 without own class, NaN for a label that is neither a
    class nor ``ignore_index`` (if SUPERVISED). label (samples,) int32: the class; -1 ignored; -2 not a class.
    flags (row blocks, class_tiles) int8, cleared before: 1 where a tile holds the own class of one of its rows, and in
    the last column if that tile reaches beyond the classes (RAGGED). Several rows may write the same 1.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = rows < samples
    label = tl.load(labels_ptr + rows.to(tl.int64) * labels_stride, mask=inside, other=-1).to(tl.int64)
    valid = inside & (label >= 0) & (label < classes)
    ignored = label != label
    if SUPERVISED:
        ignored = label == ignore_index
        valid = valid & (label != ignore_index)
    cells = (columns < width)[None, :]
    offsets = rows.to(tl.int64)[:, None] * features_row_stride + columns.to(tl.int64)[None, :] * features_column_stride
    values = tl.load(features_ptr + offsets, mask=inside[:, None] & cells, other=0.0).to(tl.float32)
    x, x_power, x_inverse = scaled_rows(values)
    if HAS_COPY:
        copied = unit_rows(x, x_inverse) if NORMALIZE else values
        copy_cells = copy_ptr + rows.to(tl.int64)[:, None] * copy_stride + columns[None, :]
        tl.store(copy_cells, copied.to(copy_ptr.dtype.element_ty), mask=inside[:, None] & cells)
    own_row = tl.where(valid, label, 0)
    offsets = own_row[:, None] * prototypes_row_stride + columns.to(tl.int64)[None, :] * prototypes_column_stride
    w = tl.load(prototypes_ptr + offsets, mask=valid[:, None] & cells, other=0.0).to(tl.float32)
    w, _, w_inverse = scaled_rows(w)
    cosine = tl.sum(x * w, 1) * x_inverse * w_inverse
    cosine = tl.where(valid, cosine, float("nan") if SUPERVISED else 0.0)
    tl.store(own_cosine_ptr + rows, tl.where(ignored, 0.0, cosine), mask=inside)
    tl.store(label_ptr + rows, tl.where(valid, label, tl.where(ignored, -1, -2)).to(tl.int32), mask=inside)
    tl.store(inverse_norm_ptr + rows, x_inverse * x_power, mask=inside)
    if not NORMALIZE:
        length = tl.sqrt_rn(tl.sum(x * x, 1))
        tl.store(length_ptr + rows, tl.div_rn(length, x_power), mask=inside)
    flag_row = (rows // FLAG_ROWS).to(tl.int64) * class_tiles
    one = tl.full((ROWS,), 1, tl.int8)
    tl.store(flags_ptr + flag_row + own_row // FLAG_CLASSES, one, mask=valid)
    if RAGGED:
        tl.store(flags_ptr + flag_row + class_tiles - 1, one, mask=inside & (rows % FLAG_ROWS == 0))


@triton.jit(
    do_not_specialize=[
        "samples",
        "classes",
        "first_tile",
        "slab_tiles",
        "class_tiles",
        "tiles_per_split",
        "first_split",
        "slab_classes",
    ]
)
def cosine_logsumexp_kernel(
    # inputs
    features,
    prototypes,
    class_factor_ptr,
    prior_ptr,
    label_ptr,
    flags_ptr,
    # outputs
    partial_sum_ptr,
    partial_max_ptr,
    partial_logit_ptr,
    # sizes
    samples,
    classes,
    width,
    first_tile,
    slab_tiles,
    class_tiles,
    tiles_per_split,
    first_split,
    slab_classes,
    features_stride,
    prototypes_stride,
    shift,
    # constants
    DESCRIBED: tl.constexpr,
    ONLINE: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
    WITH_LOGIT_SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Partial sums over the other classes of exp(l - shift): one row block by one range of class tiles per program.

    features: (samples, width); prototypes: a slab of the classes, (slab_classes, width), whose first tile is the
    ``first_tile``-th of all; both are descriptors if DESCRIBED. label (samples,); class_factor s·log2 e/‖w‖ and prior
    b·log2 e (class_tiles · BLOCK_CLASSES,), 0 and -inf beyond the classes; flags (row blocks, class_tiles).
    partial_sum (splits, samples): Σ 2^(l·log2 e - shift). The shift, in units of log 2, is the argument, or if ONLINE
    the running maximum of each row, which partial_max (splits, samples) returns. partial_logit (splits, samples):
    Σ s·cos over all classes of the range, if WITH_LOGIT_SUM.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < samples
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    largest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    logit_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, slab_tiles)
    flags_row = flags_ptr + block.to(tl.int64) * class_tiles
    tl.assume(width > 0)  # else the flattened loop has a second body, for products of no columns
    for tile in tl.range(first, last, flatten=True):
        product = tile_product(
            features, prototypes, block, tile, samples, slab_classes, width, features_stride, prototypes_stride,
            DESCRIBED, PRECISION, BLOCK_ROWS, BLOCK_CLASSES, BLOCK_DEPTH,
        )  # fmt: skip
        classes_here = (first_tile + tile) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
        logit = product * tl.load(class_factor_ptr + classes_here)[None, :]
        if WITH_LOGIT_SUM:
            logit_sum += tl.sum(logit, 1)
        if HAS_PRIOR:
            logit += tl.load(prior_ptr + classes_here)[None, :]
        elif not ONLINE:
            logit -= shift
        if tl.load(flags_row + first_tile + tile) != 0:
            label = tl.load(label_ptr + rows, mask=inside, other=-1)[:, None]
            here = classes_here[None, :]
            logit = tl.where((here == label) | (here >= classes), float("-inf"), logit)
        if ONLINE:
            new = tl.maximum(largest, tl.max(logit, 1))
            base = tl.where(new == float("-inf"), 0.0, new)  # no other class yet: -inf - -inf would be NaN
            total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(logit - base[:, None]), 1)
            largest = new
        else:
            total += tl.sum(tl.exp2(logit), 1)
    cell = (first_split + split).to(tl.int64) * samples + rows
    tl.store(partial_sum_ptr + cell, total, mask=inside)
    if ONLINE:
        tl.store(partial_max_ptr + cell, largest, mask=inside)
    if WITH_LOGIT_SUM:
        tl.store(partial_logit_ptr + cell, logit_sum * LN2, mask=inside)


@triton.jit
def combine_splits(partial_sum_ptr, partial_max_ptr, rows, inside, samples, splits, shift, ONLINE: tl.constexpr):
    """Add the splits of some rows: (base, total, log total) with Σ_{c≠y} exp(l) = 2^base·total; always in one order."""
    stride = samples.to(tl.int64)
    total = tl.zeros(rows.shape, tl.float32)
    base = tl.full(rows.shape, 1.0, tl.float32) * shift
    if ONLINE:
        base = tl.full(rows.shape, float("-inf"), tl.float32)
        for split in range(splits):
            base = tl.maximum(base, tl.load(partial_max_ptr + split * stride + rows, mask=inside, other=0.0))
        base = tl.where(base == float("-inf"), 0.0, base)
    for split in range(splits):
        partial = tl.load(partial_sum_ptr + split * stride + rows, mask=inside, other=0.0)
        if ONLINE:
            largest = tl.load(partial_max_ptr + split * stride + rows, mask=inside, other=0.0)
            partial *= tl.exp2(largest - base)
        total += partial
    return base, total, log(total)


@triton.jit
def add_splits(partial_ptr, rows, inside, samples, splits):
    """Σ over the splits of some rows, always in one order."""
    stride = samples.to(tl.int64)
    total = tl.zeros(rows.shape, tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + split * stride + rows, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=["samples", "splits"])
def combine_kernel(
    # inputs
    partial_sum_ptr,
    partial_max_ptr,
    partial_logit_ptr,
    own_cosine_ptr,
    length_ptr,
    # outputs
    other_logsumexp_ptr,
    own_logit_ptr,
    logit_sum_ptr,
    # sizes
    samples,
    splits,
    shift,
    scale,
    # constants
    ONLINE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WITH_LOGIT_SUM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """r, t and Σ_c s·cos_c from the partial sums.

    partial_* (splits, samples); own_cosine, length (samples,). other_logsumexp, own_logit, logit_sum (samples,), in
    natural units.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < samples
    base, _, log_total = combine_splits(partial_sum_ptr, partial_max_ptr, rows, inside, samples, splits, shift, ONLINE)
    tl.store(other_logsumexp_ptr + rows, base * LN2 + log_total, mask=inside)
    own = tl.load(own_cosine_ptr + rows, mask=inside, other=0.0) * scale
    if not NORMALIZE:
        own *= tl.load(length_ptr + rows, mask=inside, other=0.0)
    tl.store(own_logit_ptr + rows, own, mask=inside)
    if WITH_LOGIT_SUM:
        logit_sum = add_splits(partial_logit_ptr, rows, inside, samples, splits)
        tl.store(logit_sum_ptr + rows, logit_sum, mask=inside)
