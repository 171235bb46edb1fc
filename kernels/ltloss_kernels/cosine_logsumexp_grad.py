"""Backward: the gradient of the logits tile by tile into a slab, and the way back through the norms.

With G_ic = ∂L/∂l_ic, and X̃, W̃ the rows as the matrix unit gets them (scaled by powers of two or not at all), a tile is
dZ_ic = G_ic·α_i·β_c with α_i = s/‖x̃_i‖ and β_c = 1/‖w̃_c‖, both applied in float32. Then dZ·W̃ and dZᵀ·X̃ are the
gradients for x̃ and w̃ up to the projection onto the tangent space, and no normalised matrix exists.

In float16 the slab is multiplied by a power of two that brings its largest possible entry to 2^13, and operands are
always copies with a largest entry in [1, 2) per row; so nothing overflows, and only what is 2^-37 of the largest
coefficient of the batch is lost.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from ltloss_kernels.arithmetic import LOG2E, power_of_two_below, scaled_rows
from ltloss_kernels.blocks import load_block, store_block

__all__ = ["gradient_tile_kernel", "projection_kernel"]


@triton.jit
def slab_scale(bound_ptr, upstream_bound_ptr, inverse_total_ptr, scale, HAS_TOTAL: tl.constexpr):
    """The power of two on a float16 slab, from the largest coefficient, upstream gradient and scale."""
    bound = tl.load(bound_ptr) * tl.abs(tl.load(upstream_bound_ptr)) * scale
    if HAS_TOTAL:
        bound *= tl.load(inverse_total_ptr)
    return 4096.0 * power_of_two_below(tl.where(bound < 1e-30, 1e-30, bound))


@triton.jit(do_not_specialize=["samples", "classes", "first_class", "class_tiles", "coefficients_stride"])
def gradient_tile_kernel(
    # inputs
    features,
    prototypes,
    feature_factor_ptr,
    class_factor_ptr,
    prior_ptr,
    labels_ptr,
    coefficients_ptr,
    upstream_ptr,
    inverse_total_ptr,
    bound_ptr,
    upstream_bound_ptr,
    # outputs
    slab,
    # sizes
    samples,
    classes,
    width,
    first_class,
    class_tiles,
    labels_stride,
    coefficients_stride,
    upstream_stride,
    features_stride,
    prototypes_stride,
    slab_stride,
    scale,
    # constants
    DESCRIBED: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    SMOOTH: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """One tile of dZ: 2^(l·log2 e - shift_i)·other_i + every_i, own_i in the column of the label, all times α_i·β_c.

    features: (samples, width); prototypes: a slab (classes, width), whose first class is the ``first_class``-th of all;
    both, and the result, are descriptors if DESCRIBED. feature_factor (samples,) and class_factor (classes,) without
    the scale; prior (classes,) in natural units; labels (samples,), strided; coefficients (≥ 4, samples) as
    margin_cross_entropy_kernel writes them; upstream (samples,), stride 0 for a scalar; inverse_total, bound,
    upstream_bound: scalars. slab: (samples, classes).
    Class tiles are taken in groups, so that the programs at work at one time share feature rows and prototypes.
    """
    program = tl.program_id(0)
    row_blocks = tl.cdiv(samples, BLOCK_ROWS)
    group = program // (GROUP * row_blocks)
    in_group = program % (GROUP * row_blocks)
    group_width = tl.minimum(class_tiles - group * GROUP, GROUP)
    tile = group * GROUP + in_group % group_width
    block = in_group // group_width
    product = tl.zeros((BLOCK_ROWS, BLOCK_CLASSES), tl.float32)
    for k in range(0, width, BLOCK_DEPTH):
        x = load_block(
            features, block * BLOCK_ROWS, k, samples, width, features_stride, BLOCK_ROWS, BLOCK_DEPTH, DESCRIBED
        )
        w = load_block(
            prototypes,
            tile * BLOCK_CLASSES,
            k,
            classes,
            width,
            prototypes_stride,
            BLOCK_CLASSES,
            BLOCK_DEPTH,
            DESCRIBED,
        )
        product = tl.dot(x, w.T, product, input_precision=PRECISION)

    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = tile * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    inside = rows < samples
    known = here < classes
    alpha = tl.load(feature_factor_ptr + rows, mask=inside, other=0.0) * scale
    beta = tl.load(class_factor_ptr + here, mask=known, other=0.0)
    at = coefficients_ptr + rows
    stride = coefficients_stride.to(tl.int64)
    shift = tl.load(at, mask=inside, other=float("inf"))
    other = tl.load(at + stride, mask=inside, other=0.0)
    own = tl.load(at + 2 * stride, mask=inside, other=0.0)
    upstream = tl.load(upstream_ptr + rows.to(tl.int64) * upstream_stride, mask=inside, other=0.0).to(tl.float32)
    # An ignored sample sends nothing back, not even NaN times zero.
    factor = tl.where((other == 0.0) & (own == 0.0), 0.0, upstream) * alpha
    if HAS_TOTAL:
        factor *= tl.load(inverse_total_ptr)
    if SCALED:
        factor *= slab_scale(bound_ptr, upstream_bound_ptr, inverse_total_ptr, scale, HAS_TOTAL)
    logit = (product * beta[None, :]) * (alpha * LOG2E)[:, None] - shift[:, None]
    if HAS_PRIOR:
        logit += (tl.load(prior_ptr + here, mask=known, other=0.0) * LOG2E)[None, :]
    gradient = tl.exp2(logit) * (other * factor)[:, None]
    if SMOOTH:
        gradient += (tl.load(at + 3 * stride, mask=inside, other=0.0) * factor)[:, None]
    label = tl.load(labels_ptr + rows.to(tl.int64) * labels_stride, mask=inside, other=-1).to(tl.int64) - first_class
    first = tile * BLOCK_CLASSES
    holds_a_label = tl.max(((label >= first) & (label < first + BLOCK_CLASSES)).to(tl.int32), 0)
    if holds_a_label != 0:
        gradient = tl.where(here[None, :] == label[:, None], (own * factor)[:, None], gradient)
    gradient *= beta[None, :]
    row, column = block * BLOCK_ROWS, tile * BLOCK_CLASSES
    store_block(slab, gradient, row, column, samples, classes, slab_stride, BLOCK_ROWS, BLOCK_CLASSES, DESCRIBED)


@triton.jit
def project_rows(
    gradient_ptr,
    vectors_ptr,
    used,
    out_ptr,
    rows,
    inside,
    width,
    gradient_stride,
    row_stride,
    column_stride,
    out_stride,
    inverse_slab_scale,
    along,
    COPIED: tl.constexpr,
    PROJECT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(g - (g·v̂) v̂) 2^p/S of some rows; where the length counts (not PROJECT), g/S + along·v̂."""
    columns = tl.arange(0, WIDTH)
    cells = (columns < width)[None, :]
    wide = rows.to(tl.int64)[:, None]
    offsets = wide * row_stride + columns.to(tl.int64)[None, :] * column_stride
    v = tl.load(vectors_ptr + offsets, mask=used[:, None] & cells, other=0.0).to(tl.float32)
    g = tl.load(gradient_ptr + wide * gradient_stride + columns[None, :], mask=inside[:, None] & cells, other=0.0)
    v, power, inverse = scaled_rows(v)
    unit = v * inverse[:, None]
    if PROJECT:
        g -= tl.sum(g * unit, 1)[:, None] * unit
    if COPIED:
        g *= power[:, None]
    g *= inverse_slab_scale
    if not PROJECT:
        g += along[:, None] * unit
    out = out_ptr + wide * out_stride + columns[None, :]
    tl.store(out, g.to(out_ptr.dtype.element_ty), mask=inside[:, None] & cells)


@triton.jit(do_not_specialize=["samples", "classes", "feature_blocks", "coefficients_stride"])
def projection_kernel(
    # inputs
    feature_gradient_ptr,
    prototype_gradient_ptr,
    features_ptr,
    prototypes_ptr,
    labels_ptr,
    coefficients_ptr,
    upstream_ptr,
    inverse_total_ptr,
    bound_ptr,
    upstream_bound_ptr,
    # outputs
    grad_features_ptr,
    grad_prototypes_ptr,
    # sizes
    samples,
    classes,
    width,
    feature_blocks,
    feature_gradient_stride,
    features_row_stride,
    features_column_stride,
    prototype_gradient_stride,
    prototypes_row_stride,
    prototypes_column_stride,
    labels_stride,
    coefficients_stride,
    upstream_stride,
    ignore_index,
    scale,
    # constants
    FEATURES: tl.constexpr,
    PROTOTYPES: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LENGTH: tl.constexpr,
    PROTOTYPES_COPIED: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradients of the raw rows: the first ``feature_blocks`` programs take the features, the others a slab.

    feature_gradient (samples, width) and prototype_gradient (classes, width) float32: the two products. features,
    prototypes: the original rows, any dtype and strides, in the same order; labels (samples,): rows labelled
    ``ignore_index`` count as zero (if HAS_LABELS). coefficients (5, samples), whose last row is ∂L/∂‖x‖ (if LENGTH);
    upstream (samples,), stride 0 for a scalar; inverse_total, bound, upstream_bound: scalars.
    grad_features, grad_prototypes: as large as the rows, their columns next to each other; may be the input itself.
    """
    program = tl.program_id(0)
    inverse_slab_scale = 1.0
    if SCALED:
        inverse_slab_scale = 1.0 / slab_scale(bound_ptr, upstream_bound_ptr, inverse_total_ptr, scale, HAS_TOTAL)
    if FEATURES:  # noqa: SIM102 - a constant and a value of the device do not go in one condition
        if program < feature_blocks:
            rows = program * ROWS + tl.arange(0, ROWS)
            inside = rows < samples
            used = inside
            if HAS_LABELS:
                labels = tl.load(labels_ptr + rows.to(tl.int64) * labels_stride, mask=inside, other=0)
                used = inside & (labels != ignore_index)
            along = tl.zeros((ROWS,), tl.float32)
            if LENGTH:
                last = coefficients_ptr + 4 * coefficients_stride.to(tl.int64)
                along = tl.load(last + rows, mask=used, other=0.0)
                along *= tl.load(upstream_ptr + rows.to(tl.int64) * upstream_stride, mask=used, other=0.0)
                if HAS_TOTAL:
                    along *= tl.load(inverse_total_ptr)
            project_rows(
                feature_gradient_ptr, features_ptr, used, grad_features_ptr, rows, inside, width,
                feature_gradient_stride, features_row_stride, features_column_stride, width, inverse_slab_scale, along,
                NORMALIZE, NORMALIZE, WIDTH,
            )  # fmt: skip
    if PROTOTYPES:  # noqa: SIM102 - likewise
        if program >= feature_blocks:
            rows = (program - feature_blocks) * ROWS + tl.arange(0, ROWS)
            inside = rows < classes
            project_rows(
                prototype_gradient_ptr, prototypes_ptr, inside, grad_prototypes_ptr, rows, inside, width,
                prototype_gradient_stride, prototypes_row_stride, prototypes_column_stride, width, inverse_slab_scale,
                tl.zeros((ROWS,), tl.float32), PROTOTYPES_COPIED, True, WIDTH,
            )  # fmt: skip
