"""Backward: the gradient of each sample's coefficients, and the gradient of the logits tile by tile into a slab dZ.

    dZ_ic = G_ic·s/‖w̃_c‖,   G_ic = ∂L/∂l_ic

X̂ are the features as the product reads them: unit rows, or the rows as they are where their length counts. W̃ are the
prototypes as the product reads them: as they are, or scaled by powers of two. dZ·W̃ and dZᵀ·X̂ are then the gradients
of x̂ and w̃, before their projection onto the tangent space, which ``projection`` does. No normalised prototypes exist.

In float16 the slab is multiplied by a power of two that brings its largest possible entry into [2^12, 2^13), and
prototypes are always copies whose rows have their largest entry in [1, 2). So nothing overflows, and only entries below
about 2^-37 of the largest possible one are lost.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from ltloss_kernels.device.elementary import (
    LN2,
    LOG2E,
    TINY,
    log,
    power_of_two_below,
    scaled_rows,
    unit_rows,
)
from ltloss_kernels.device.logsumexp_forward import bent, load_thresholds, tile_logits
from ltloss_kernels.device.tile_io import holds_a_label, load_block, store_block

__all__ = ["gradient_tile_kernel", "sample_gradient_kernel", "slab_scale"]


@triton.jit
def slab_scale(max_coefficient_ptr, max_upstream_ptr, inverse_weight_sum_ptr, scale):
    """The power of two that a float16 slab is multiplied by, from the largest coefficient, upstream and scale."""
    bound = tl.load(max_coefficient_ptr) * tl.abs(tl.load(max_upstream_ptr)) * scale
    if inverse_weight_sum_ptr is not None:
        bound *= tl.load(inverse_weight_sum_ptr)
    return 4096.0 * power_of_two_below(tl.where(bound < 1e-30, 1e-30, bound))


@triton.jit
def unless_zero(coefficient, factor):
    """Their product, 0 where the coefficient is: an ignored sample sends nothing back, not even NaN times zero."""
    return tl.where(coefficient == 0.0, 0.0, coefficient * factor)


@triton.jit(do_not_specialize=["samples", "classes", "coefficients_stride"])
def sample_gradient_kernel(
    # inputs
    features_ptr,
    labels_ptr,
    coefficients_ptr,
    upstream_ptr,
    inverse_weight_sum_ptr,
    max_coefficient_ptr,
    max_upstream_ptr,
    # outputs
    copy_ptr,
    label_ptr,
    sample_gradients_ptr,
    factor_ptr,
    # sizes
    samples,
    classes,
    width,
    features_row_stride,
    features_column_stride,
    labels_stride,
    coefficients_stride,
    upstream_stride,
    copy_stride,
    labels_column_stride,
    more_targets,
    ignore_index,
    scale,
    # constants
    TARGETS: tl.constexpr,
    COPY: tl.constexpr,
    FOLD: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The operand, labels and coefficients of each sample for the tiles of dZ, with the upstream gradient applied.

    Inputs:
        features (samples, width), labels (samples, TARGETS): any dtype and strides.
        coefficients (>= 4, samples) as margin_loss_kernel writes them. The d_target of labels after the first are in
            the rows from ``more_targets`` on.
        upstream (samples,), stride 0 for a scalar. inverse_weight_sum: a scalar factor of it, or None.
        max_coefficient, max_upstream: scalars, the largest of each, for a float16 slab; else None.
    Outputs:
        copy (samples, width) in the dtype of the product: unit rows if COPY is "unit", the rows as they are if "plain";
            zeros from ``width`` to copy_stride. A row with the label ``ignore_index`` (unless None) is 0, since 0·NaN
            in a product would reach every class.
        label (TARGETS, samples) int32: the class, or -1.
        sample_gradients (3 + TARGETS, samples): shift, d_lse, d_target, d_all, and d_target of the later labels. All
            but the shift are multiplied by the upstream gradient, by ln 2 (since the scale of the tiles brings log2 e)
            and by the power of two of a float16 slab.
        factor: a scalar that divides ln 2 and that power out again, or None.
    FOLD puts |d_lse| into the shift and leaves its sign in d_lse. This saves the tiles a multiplication per element and
    costs a row some 1e-5 of its accuracy, which is nothing to a slab in half precision.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < samples
    label = tl.load(labels_ptr + rows.to(tl.int64) * labels_stride, mask=inside, other=-1).to(tl.int64)
    used = inside
    if ignore_index is not None:
        used = inside & (label != ignore_index)
    tl.store(label_ptr + rows, tl.where(used & (label >= 0) & (label < classes), label, -1).to(tl.int32), mask=inside)
    columns = tl.arange(0, WIDTH)
    cells = (columns < width)[None, :]
    offsets = rows.to(tl.int64)[:, None] * features_row_stride + columns.to(tl.int64)[None, :] * features_column_stride
    copied = tl.load(features_ptr + offsets, mask=used[:, None] & cells, other=0.0).to(tl.float32)
    if COPY == "unit":
        scaled, _, inverse = scaled_rows(copied)
        copied = unit_rows(scaled, inverse)
    copy_cells = copy_ptr + rows.to(tl.int64)[:, None] * copy_stride + columns[None, :]
    whole = inside[:, None] & (columns < tl.cast(copy_stride, tl.int64))[None, :]
    tl.store(copy_cells, copied.to(copy_ptr.dtype.element_ty), mask=whole)

    at = coefficients_ptr + rows
    stride = coefficients_stride.to(tl.int64)
    shift = tl.load(at, mask=inside, other=float("inf"))
    d_lse = tl.load(at + stride, mask=inside, other=0.0)
    d_target = tl.load(at + 2 * stride, mask=inside, other=0.0)
    d_all = tl.load(at + 3 * stride, mask=inside, other=0.0)
    upstream = tl.load(upstream_ptr + rows.to(tl.int64) * upstream_stride, mask=inside, other=0.0).to(tl.float32)
    factor = upstream * LN2
    if inverse_weight_sum_ptr is not None:
        factor *= tl.load(inverse_weight_sum_ptr)
    constant = 1.0 / LN2
    if max_coefficient_ptr is not None:
        power = slab_scale(max_coefficient_ptr, max_upstream_ptr, inverse_weight_sum_ptr, scale)
        factor *= power
        constant /= power
    if factor_ptr is not None:  # noqa: SIM102 - a constant and a value of the device do not go in one condition
        if tl.program_id(0) == 0:
            tl.store(factor_ptr, constant)
    d_lse = unless_zero(d_lse, factor)
    if FOLD:
        size = tl.abs(d_lse)
        shift -= tl.where(size < TINY, float("-inf"), log(size) * LOG2E)
    at = sample_gradients_ptr + rows
    stride = samples.to(tl.int64)
    tl.store(at, shift, mask=inside)
    tl.store(at + stride, d_lse, mask=inside)
    tl.store(at + 2 * stride, unless_zero(d_target, factor), mask=inside)
    tl.store(at + 3 * stride, unless_zero(d_all, factor), mask=inside)
    for place in tl.static_range(1, TARGETS):
        label_at = labels_ptr + rows.to(tl.int64) * labels_stride + place * labels_column_stride
        label = tl.load(label_at, mask=inside, other=-1).to(tl.int64)
        known = used & (label >= 0) & (label < classes)
        cell = label_ptr + place * stride + rows
        tl.store(cell, tl.where(known, label, -1).to(tl.int32), mask=inside)
        coefficient = coefficients_ptr + (more_targets + place - 1) * coefficients_stride.to(tl.int64) + rows
        d_target = tl.load(coefficient, mask=inside, other=0.0)
        tl.store(at + (3 + place) * stride, unless_zero(d_target, factor), mask=inside)


@triton.jit
def exponential_gradient(logit, d_lse, FOLD: tl.constexpr):
    """2^l·d_lse of a tile (R, C); with FOLD |d_lse| is in l already, and only its sign is applied."""
    gradient = tl.exp2(logit)
    if not FOLD:
        gradient *= d_lse[:, None]
    elif tl.min(d_lse, 0) < 0.0:  # a negative upstream gradient
        gradient = tl.where((d_lse < 0.0)[:, None], -gradient, gradient)
    return gradient


@triton.jit
def store_of_centers(
    slab, gradient, nearest, logit_scale_ptr, row, column, samples, classes, class_tiles, stride,
    DESCRIBED: tl.constexpr, SUB_CENTERS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """Store dZ of each sub-centre in its part of the slab: gradient (R, C) times its scale where it is nearest, else 0.

    Each part has whole tiles, 0 beyond the classes.
    """
    here, columns = column + tl.arange(0, BLOCK_CLASSES), class_tiles * BLOCK_CLASSES
    for k in tl.static_range(SUB_CENTERS):
        scale = tl.load(logit_scale_ptr + here * SUB_CENTERS + k, mask=here < classes, other=0.0)
        own = tl.where((nearest == k) & (here < classes)[None, :], gradient * scale[None, :], 0.0)
        store_block(
            slab, own, row, k * columns + column, samples, SUB_CENTERS * columns, stride, BLOCK_ROWS, BLOCK_CLASSES,
            DESCRIBED, True,
        )  # fmt: skip


@triton.jit
def load_kept_shift(shift_ptr, shift, rows, inside, column, stride, KEPT_CLASSES: tl.constexpr):
    """The shift of some rows (R,) in the tile of KEPT_CLASSES that holds this column; or ``shift`` for all."""
    if shift_ptr is not None:
        at = shift_ptr + (column // KEPT_CLASSES).to(tl.int64) * stride + rows
        shift = tl.load(at, mask=inside, other=0.0)
    return shift


@triton.jit
def kept_gradient(
    kept,
    kept_shift,
    shift,
    d_lse,
    row,
    column,
    samples,
    classes,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """2^(l·log2 e - shift)·d_lse of a tile (R, C) from its kept 2^(l·log2 e - kept_shift).

    kept_shift: (R,) or a number.
    The factors are applied one by one, as their product may leave the range of float32. Exponentials of an ignored row
    may be NaN; its gradient is 0.
    """
    gradient = load_block(
        kept, row, column, samples, classes, stride, BLOCK_ROWS, BLOCK_CLASSES, DESCRIBED
    ).to(tl.float32)  # fmt: skip
    gradient = gradient * tl.exp2(kept_shift - shift)[:, None] * d_lse[:, None]
    if tl.min(tl.abs(d_lse), 0) == 0.0:
        gradient = tl.where((d_lse == 0.0)[:, None], 0.0, gradient)
    return gradient


@triton.jit(
    do_not_specialize=["samples", "classes", "first_class", "class_tiles", "sample_gradients_stride", "label_stride"]
)
def gradient_tile_kernel(
    # inputs
    features,
    prototypes,
    logit_scale_log2_ptr,
    prior_ptr,
    label_ptr,
    sample_gradients_ptr,
    threshold_ptr,
    polynomial_ptr,
    kept,
    kept_shift_ptr,
    # outputs
    slab,
    along_ptr,
    through_r_ptr,
    # sizes
    samples,
    classes,
    width,
    first_class,
    class_tiles,
    sample_gradients_stride,
    label_stride,
    features_stride,
    prototypes_stride,
    slab_stride,
    kept_stride,
    kept_shift_stride,
    kept_shift,
    # constants
    DESCRIBED: tl.constexpr,
    SMOOTH: tl.constexpr,
    FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    KEPT_CLASSES: tl.constexpr,
    SUB_CENTERS: tl.constexpr,
    TARGETS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """One tile of dZ: 2^(l·log2 e - shift)·d_lse + d_all, or d_target in the column of a label, all times s/‖w̃_c‖.

    Programs take GROUP class tiles together, so that those at work at one time share feature rows and prototypes.

    Inputs:
        features (samples, width), prototypes (classes, width), descriptors if DESCRIBED. The prototypes are a slab
            whose first class is number ``first_class`` of all.
        logit_scale_log2 (classes,): s·log2 e/‖w̃‖. prior (classes,): in natural units, or None.
        label (TARGETS, samples), rows ``label_stride`` apart; sample_gradients (3 + TARGETS, samples), rows
            ``sample_gradients_stride`` apart: see sample_gradient_kernel, also for FOLD.
        threshold (samples,) and polynomial (3,), or None: see :func:`bent`.
        kept (samples, all classes) or None, a descriptor if DESCRIBED: the exponentials of the forward, relative to
            kept_shift_ptr (tiles of KEPT_CLASSES, samples), whose rows are kept_shift_stride apart, or to the number
            kept_shift. Features, prototypes, prior and along are then None, and FOLD is off.
    Outputs:
        slab (samples, classes), a descriptor if DESCRIBED.
        along (row blocks, classes) or None: the sum of dZ_ic·(x̂_i·w̃_c) over each row block. These add up to g·w̃_c
            with g = dZᵀX̂, for prototype_gradient_kernel.
        through_r (row blocks, classes) or None: the sum of 2^(l·log2 e - shift)·d_lse over the samples of each row
            block with other labels, for the gradient of the prior.
    With several SUB_CENTERS a row of the prototypes holds the sub-centres of a class beside each other, and
    logit_scale_log2 has an entry for each. Part k of the slab, class_tiles · BLOCK_CLASSES columns, holds dZ of
    sub-centre k: 0 where another is nearest, and beyond the classes. Then kept and along are None.
    """
    program = tl.program_id(0)
    row_blocks = tl.cdiv(samples, BLOCK_ROWS)
    group = program // (GROUP * row_blocks)
    in_group = program % (GROUP * row_blocks)
    group_width = tl.minimum(class_tiles - group * GROUP, GROUP)
    block = in_group // group_width
    tile = group * GROUP + in_group % group_width
    row, column = block * BLOCK_ROWS, tile * BLOCK_CLASSES
    rows = row + tl.arange(0, BLOCK_ROWS)
    here = column + tl.arange(0, BLOCK_CLASSES)
    inside = rows < samples
    known = here < classes
    if kept is None:
        logit, product, scale, nearest = tile_logits(
            features, prototypes, logit_scale_log2_ptr, block, tile, here, known, samples, classes, width,
            features_stride, prototypes_stride, None, DESCRIBED, PRECISION, SUB_CENTERS, BLOCK_ROWS, BLOCK_CLASSES,
            BLOCK_DEPTH,
        )  # fmt: skip
    at = sample_gradients_ptr + rows
    stride = sample_gradients_stride.to(tl.int64)
    shift = tl.load(at, mask=inside, other=float("inf"))
    d_lse = tl.load(at + stride, mask=inside, other=0.0)
    slope = 1.0
    if kept is None:
        logit, slope = bent(logit, load_thresholds(threshold_ptr, rows, inside), polynomial_ptr)
        logit -= shift[:, None]
        if prior_ptr is not None:
            logit += (tl.load(prior_ptr + here, mask=known, other=0.0) * LOG2E)[None, :]
        gradient = exponential_gradient(logit, d_lse, FOLD)
    else:
        scale = tl.load(logit_scale_log2_ptr + here, mask=known, other=0.0)
        gradient = kept_gradient(
            kept, load_kept_shift(
                kept_shift_ptr, kept_shift, rows, inside, first_class + column, kept_shift_stride, KEPT_CLASSES
            ), shift, d_lse, row, first_class + column, samples, first_class + classes, kept_stride,
            BLOCK_ROWS, BLOCK_CLASSES, DESCRIBED,
        )  # fmt: skip
    label = tl.load(label_ptr + rows, mask=inside, other=-1) - first_class
    if through_r_ptr is not None:
        others = tl.where(here[None, :] == label[:, None], 0.0, gradient)
        for place in tl.static_range(1, TARGETS):
            later = tl.load(label_ptr + place * label_stride.to(tl.int64) + rows, mask=inside, other=-1) - first_class
            others = tl.where(here[None, :] == later[:, None], 0.0, others)
        tl.store(through_r_ptr + block.to(tl.int64) * classes + here, tl.sum(others, 0), mask=known)
    gradient *= slope
    if SMOOTH:
        gradient += tl.load(at + 3 * stride, mask=inside, other=0.0)[:, None]
    if holds_a_label(label, column, BLOCK_CLASSES):
        d_target = tl.load(at + 2 * stride, mask=inside, other=0.0)
        gradient = tl.where(here[None, :] == label[:, None], d_target[:, None], gradient)
    for place in tl.static_range(1, TARGETS):
        later = tl.load(label_ptr + place * label_stride.to(tl.int64) + rows, mask=inside, other=-1) - first_class
        if holds_a_label(later, column, BLOCK_CLASSES):
            d_target = tl.load(at + (3 + place) * stride, mask=inside, other=0.0)
            gradient = tl.where(here[None, :] == later[:, None], d_target[:, None], gradient)
    if SUB_CENTERS > 1:
        store_of_centers(
            slab, gradient, nearest, logit_scale_log2_ptr, row, column, samples, classes, class_tiles, slab_stride,
            DESCRIBED, SUB_CENTERS, BLOCK_ROWS, BLOCK_CLASSES,
        )  # fmt: skip
        return
    gradient *= scale[None, :]
    if along_ptr is not None:
        gradient = gradient.to(slab.dtype if DESCRIBED else slab.dtype.element_ty)  # g is made from what is stored
        along = tl.sum(gradient.to(tl.float32) * product, 0)
        tl.store(along_ptr + block.to(tl.int64) * classes + here, along, mask=known)
    store_block(slab, gradient, row, column, samples, classes, slab_stride, BLOCK_ROWS, BLOCK_CLASSES, DESCRIBED, True)
