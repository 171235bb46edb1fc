"""The end of the backward: from products with dZ to the gradients of the rows, or to updated prototypes.

A normalised row v enters the logits by its direction, so its gradient lies in the tangent space: (g - (g·v̂) v̂)/‖v‖.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from ltloss_kernels.device.elementary import multiple, scaled_rows, unit_rows
from ltloss_kernels.device.logsumexp_backward import slab_scale
from ltloss_kernels.device.logsumexp_forward import add_splits
from ltloss_kernels.device.prototype_update import update_rows
from ltloss_kernels.device.tile_io import load_block, store_block

__all__ = ["projection_kernel", "prototype_gradient_kernel"]


@triton.jit(do_not_specialize=["samples", "classes", "row_blocks", "seed", "first_class"])
def prototype_gradient_kernel(
    # inputs
    slab,
    features,
    prototypes,
    logit_scale_log2_ptr,
    along_ptr,
    numbers_ptr,
    # outputs
    grad_prototypes_ptr,
    # updated
    first_ptr,
    second_ptr,
    compensation_ptr,
    # sizes
    samples,
    classes,
    width,
    row_blocks,
    slab_stride,
    features_stride,
    prototypes_stride,
    inverse_factor_scale,
    seed,
    first_class,
    # constants
    RULE: tl.constexpr,
    ROUNDING: tl.constexpr,
    CLIP: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """The gradient g - (g·ŵ) ŵ of a slab of prototypes, with the product g = dZᵀX̂ made here; one tile per program.

    A tile has BLOCK_CLASSES by BLOCK_DEPTH entries of the gradient; samples are added BLOCK_ROWS at a time. The
    prototypes must have gone into the logits as they are, not as copies.

    Inputs:
        slab: dZ (samples, classes), features: X̂ (samples, width), prototypes (classes, width); descriptors if
            DESCRIBED.
        logit_scale_log2 (classes,) and along (row_blocks, classes): see gradient_tile_kernel.
            inverse_factor_scale·logit_scale_log2 is 1/‖w‖.
        numbers: of update_numbers_kernel, or None for no update.
    Outputs:
        grad_prototypes (classes, width), columns next to each other. With ``numbers`` it is the kept prototypes, which
            update_rows moves by the gradient, along with the states and the compensation.
    """
    column_tiles = tl.cdiv(width, BLOCK_DEPTH)
    row = tl.program_id(0) // column_tiles * BLOCK_CLASSES
    column = tl.program_id(0) % column_tiles * BLOCK_DEPTH
    tl.assume(samples > 0)
    g = tl.zeros((BLOCK_CLASSES, BLOCK_DEPTH), tl.float32)
    for k in range(0, samples, BLOCK_ROWS):
        dz = load_block(slab, k, row, samples, classes, slab_stride, BLOCK_ROWS, BLOCK_CLASSES, DESCRIBED)
        x = load_block(features, k, column, samples, width, features_stride, BLOCK_ROWS, BLOCK_DEPTH, DESCRIBED)
        g = tl.dot(dz.T, x, g, input_precision=PRECISION)
    here = row + tl.arange(0, BLOCK_CLASSES)
    known = here < classes
    inverse = tl.load(logit_scale_log2_ptr + here, mask=known, other=0.0) * inverse_factor_scale
    along = add_splits(along_ptr, here, known, classes, row_blocks, 1)
    w = load_block(prototypes, row, column, classes, width, prototypes_stride, BLOCK_CLASSES, BLOCK_DEPTH, DESCRIBED)
    w = w.to(tl.float32)
    g -= (along * inverse)[:, None] * (w * inverse[:, None])
    if numbers_ptr is not None:
        update_rows(
            g, w, here, known, column, width, numbers_ptr, grad_prototypes_ptr, first_ptr, second_ptr,
            compensation_ptr, None, seed, first_class, RULE, ROUNDING, CLIP,
        )  # fmt: skip
    else:
        store_block(
            grad_prototypes_ptr, g, row, column, classes, width, width, BLOCK_CLASSES, BLOCK_DEPTH, False, False
        )


@triton.jit
def projected_rows(
    gradient_ptr,
    vectors_ptr,
    used,
    rows,
    inside,
    width,
    gradient_stride,
    row_stride,
    column_stride,
    inverse_slab_scale,
    along,
    COPY: tl.constexpr,
    DIRECTION: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradient of the rows v from g, the gradient of the rows that went into the product.

    S is the power of two on a float16 slab, whose inverse is inverse_slab_scale. By COPY, what the product read:

        "none"    v itself:         (g - (g·v̂) v̂)/S
        "scaled"  2^p·v:            (g - (g·v̂) v̂)/S·2^p
        "unit"    v̂:                (g - (g·v̂) v̂)/S/‖v‖
        "plain"   v, whose length counts in the logits: g/S + along·v̂, and 0 for a zero row

    Without DIRECTION the logits are linear in v: the projection and along are left out. UNIT divides width and the
    strides of rows. Returns the gradient and v, both (rows, WIDTH) and 0 beyond ``width``.
    """
    width, row_stride = multiple(width, UNIT), multiple(row_stride, UNIT)
    gradient_stride = multiple(gradient_stride, UNIT)
    columns = tl.arange(0, WIDTH)
    cells = (columns < width)[None, :]
    wide = rows.to(tl.int64)[:, None]
    offsets = wide * row_stride + columns.to(tl.int64)[None, :] * column_stride
    v = tl.load(vectors_ptr + offsets, mask=used[:, None] & cells, other=0.0).to(tl.float32)
    g = tl.load(gradient_ptr + wide * gradient_stride + columns[None, :], mask=inside[:, None] & cells, other=0.0)
    scaled, power, inverse = scaled_rows(v)
    unit = unit_rows(scaled, inverse)
    g *= inverse_slab_scale
    if not DIRECTION:
        pass
    elif COPY == "plain":
        g = tl.where((inverse == 0.0)[:, None], 0.0, g) + along[:, None] * unit
    else:
        g -= tl.sum(g * unit, 1)[:, None] * unit
    if COPY == "scaled":
        g *= power[:, None]
    elif COPY == "unit":
        g *= (power * inverse)[:, None]
    return g, v


@triton.jit
def store_rows(out_ptr, values, rows, inside, width, UNIT: tl.constexpr):
    """Store whole rows (R, WIDTH) in a contiguous matrix (·, width); UNIT divides width."""
    width = multiple(width, UNIT)
    columns = tl.arange(0, values.shape[1])
    out = out_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out, values.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (columns < width)[None, :])


@triton.jit(do_not_specialize=["samples", "classes", "feature_blocks", "seed", "first_class"])
def projection_kernel(
    # inputs
    feature_gradient_ptr,
    prototype_gradient_ptr,
    features_ptr,
    prototypes_ptr,
    labels_ptr,
    d_norm_ptr,
    upstream_ptr,
    inverse_weight_sum_ptr,
    max_coefficient_ptr,
    max_upstream_ptr,
    numbers_ptr,
    # outputs
    grad_features_ptr,
    grad_prototypes_ptr,
    # updated
    first_ptr,
    second_ptr,
    compensation_ptr,
    exponent_ptr,
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
    upstream_stride,
    ignore_index,
    scale,
    seed,
    first_class,
    # constants
    RULE: tl.constexpr,
    ROUNDING: tl.constexpr,
    CLIP: tl.constexpr,
    FEATURE_COPY: tl.constexpr,
    PROTOTYPE_COPY: tl.constexpr,
    NORMALIZE_PROTOTYPES: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradients of the original rows: the first ``feature_blocks`` programs take features, the others prototypes.

    Inputs:
        feature_gradient (samples, width), prototype_gradient (classes, width), float32: dZ·W̃ and dZᵀ·X̂; None for one
            that is not needed.
        features (samples, width), prototypes (classes, width): the original rows, any dtype and strides.
        labels (samples,): features with the label ``ignore_index`` (unless None) count as zero.
        d_norm (samples,): row 4 of the coefficients, or None. upstream (samples,), stride 0 for a scalar.
        inverse_weight_sum, max_coefficient, max_upstream: as for sample_gradient_kernel.
        numbers: of update_numbers_kernel, or None for no update.
    Outputs:
        grad_features (samples, width), grad_prototypes (classes, width): contiguous; may be the gradients given above.
            With ``numbers`` grad_prototypes is the kept prototypes, which update_rows moves, along with the states, the
            compensation and the exponents.
    FEATURE_COPY, PROTOTYPE_COPY, UNIT: see projected_rows. Without NORMALIZE_PROTOTYPES the lengths of the prototypes
    count in the logits.
    """
    program = tl.program_id(0)
    inverse_slab_scale = 1.0
    if max_coefficient_ptr is not None:
        inverse_slab_scale = 1.0 / slab_scale(max_coefficient_ptr, max_upstream_ptr, inverse_weight_sum_ptr, scale)
    if feature_gradient_ptr is not None:  # noqa: SIM102 - a constant and a value of the device do not go in one condition
        if program < feature_blocks:
            rows = program * ROWS + tl.arange(0, ROWS)
            inside = rows < samples
            used = inside
            if ignore_index is not None:
                labels = tl.load(labels_ptr + rows.to(tl.int64) * labels_stride, mask=inside, other=0)
                used = inside & (labels != ignore_index)
            along = tl.zeros((ROWS,), tl.float32)
            if d_norm_ptr is not None:
                along = tl.load(d_norm_ptr + rows, mask=used, other=0.0)
                along *= tl.load(upstream_ptr + rows.to(tl.int64) * upstream_stride, mask=used, other=0.0)
                if inverse_weight_sum_ptr is not None:
                    along *= tl.load(inverse_weight_sum_ptr)
            g, _ = projected_rows(
                feature_gradient_ptr, features_ptr, used, rows, inside, width, feature_gradient_stride,
                features_row_stride, features_column_stride, inverse_slab_scale, along, FEATURE_COPY,
                FEATURE_COPY == "unit" or NORMALIZE_PROTOTYPES, UNIT, WIDTH,
            )  # fmt: skip
            store_rows(grad_features_ptr, g, rows, inside, width, UNIT)
    if prototype_gradient_ptr is not None:  # noqa: SIM102 - likewise
        if program >= feature_blocks:
            rows = (program - feature_blocks) * ROWS + tl.arange(0, ROWS)
            inside = rows < classes
            g, w = projected_rows(
                prototype_gradient_ptr, prototypes_ptr, inside, rows, inside, width, prototype_gradient_stride,
                prototypes_row_stride, prototypes_column_stride, inverse_slab_scale, tl.zeros((ROWS,), tl.float32),
                PROTOTYPE_COPY, NORMALIZE_PROTOTYPES, UNIT, WIDTH,
            )  # fmt: skip
            if numbers_ptr is not None:
                update_rows(
                    g, w, rows, inside, 0, multiple(width, UNIT), numbers_ptr, grad_prototypes_ptr, first_ptr,
                    second_ptr, compensation_ptr, exponent_ptr, seed, first_class, RULE, ROUNDING, CLIP,
                )  # fmt: skip
            else:
                store_rows(grad_prototypes_ptr, g, rows, inside, width, UNIT)
