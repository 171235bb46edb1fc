"""The epilogue on N-vectors: margin, loss, the coefficients of the backward, and the reduction."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from ltloss_kernels.device.elementary import ANGLE_FLOOR, LN2, LOG2E, PI, arccos, exp_of_negative, log1p, sine_cosine
from ltloss_kernels.device.logsumexp_forward import add_splits, combine_splits

__all__ = ["COEFFICIENTS", "margin_cross_entropy_kernel", "reduce_kernel"]

# Rows of the coefficient matrix, see margin_cross_entropy_kernel.
COEFFICIENTS = ("shift", "other", "own", "every", "length")


@triton.jit
def margin_cosine(cosine, multiplier, angular, ARCFACE: tl.constexpr, EXACT_GRADIENT: tl.constexpr):
    """cos(m1·θ + m2), continued beyond π, and its slope d/dcos: (value, slope), as in ``ltloss.margins``.

    On the k-th stretch of length π: (-1)^k cos(phase) - 2k; or cos θ - m2·sin m2 beyond π if ARCFACE. The slope is
    m1·sin(m1·θ + m2)/sin θ, with θ kept ANGLE_FLOOR away from 0 and π, or 1 unless EXACT_GRADIENT.
    """
    theta = arccos(cosine)
    phase = multiplier * theta + angular
    _, cos_phase = sine_cosine(phase)
    stretch = tl.maximum(tl.floor(tl.div_rn(phase, tl.full(phase.shape, PI, tl.float32))), 0.0)
    if ARCFACE:
        sin_margin, _ = sine_cosine(angular)
        value = tl.where(phase > PI, cosine - angular * sin_margin, cos_phase)
    else:
        odd = stretch - 2.0 * tl.floor(0.5 * stretch)
        value = (1.0 - 2.0 * odd) * cos_phase - 2.0 * stretch
    plain = (multiplier == 1.0) & (angular == 0.0)  # θ + 0: exact, without the detour over the angle
    value = tl.where(plain, cosine, value)
    slope = tl.full(theta.shape, 1.0, tl.float32)
    if EXACT_GRADIENT:
        bounded = tl.where(
            theta < ANGLE_FLOOR, ANGLE_FLOOR, tl.where(theta > PI - ANGLE_FLOOR, PI - ANGLE_FLOOR, theta)
        )
        phase = multiplier * bounded + angular
        sin_phase, _ = sine_cosine(phase)
        sin_theta, _ = sine_cosine(bounded)
        steep = tl.div_rn(multiplier * sin_phase, sin_theta)
        if ARCFACE:
            steep = tl.where(phase > PI, 1.0, steep)
        else:
            stretch = tl.maximum(tl.floor(tl.div_rn(phase, tl.full(phase.shape, PI, tl.float32))), 0.0)
            steep = (1.0 - 2.0 * (stretch - 2.0 * tl.floor(0.5 * stretch))) * steep
        slope = tl.where(plain, 1.0, steep)
    return value, slope


@triton.jit
def per_class(vector_ptr, number, classes_of_rows, known, HAS_VECTOR: tl.constexpr):
    """The entry of each row's class in a vector (classes,), or the same number for all."""
    values = tl.full(classes_of_rows.shape, 1.0, tl.float32) * number
    if HAS_VECTOR:
        values = tl.load(vector_ptr + classes_of_rows, mask=known, other=0.0).to(tl.float32)
    return values


@triton.jit(do_not_specialize=["samples", "classes", "splits", "coefficients_stride", "blocks", "first_block"])
def margin_cross_entropy_kernel(
    # inputs
    partial_sum_ptr,
    partial_max_ptr,
    partial_logit_ptr,
    own_cosine_ptr,
    length_ptr,
    label_ptr,
    angular_margin_ptr,
    cosine_margin_ptr,
    prior_ptr,
    prior_sum_ptr,
    weight_ptr,
    # outputs
    loss_ptr,
    coefficients_ptr,
    block_sums_ptr,
    # sizes
    samples,
    classes,
    splits,
    coefficients_stride,
    blocks,
    first_block,
    shift,
    scale,
    angular_margin,
    cosine_margin,
    class_weight,
    angle_multiplier,
    label_smoothing,
    # constants
    ONLINE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_ANGLE: tl.constexpr,
    ARCFACE: tl.constexpr,
    EXACT_GRADIENT: tl.constexpr,
    HAS_ANGULAR_VECTOR: tl.constexpr,
    HAS_COSINE_VECTOR: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """From the partial sums to weighted losses and to everything that the backward needs of a sample.

    With ℓ = s, or s·‖x‖ unless NORMALIZE, margin z' = ℓ·(cos(m1·θ + m2) - m3), own logit z = z' + b_y and
    p = σ(r - z), the probability of all other classes:

        loss = softplus(r - z) + ε·(z - mean),   mean = (Σ_c l_c - t + z')/C   (ε: label smoothing)
        ∂loss/∂r = p,   ∂loss/∂z' = -p + ε - ε/C,   ∂loss/∂(Σ_c l_c) = -ε/C,   ∂loss/∂t = ∂loss/∂z'·slope + ε/C

    partial_* (splits, samples); own_cosine, length, label (samples,); angular_margin, cosine_margin, prior, weight
    (classes,); prior_sum a scalar. loss (samples,): times the weight of the class, 0 where ignored. block_sums
    (3, blocks): Σ loss, Σ weight and the largest coefficient of each program's rows. coefficients (5, samples), times
    the weight too. shift: r in units of log 2; other: ∂loss/∂r, times what rounding the shift has lost, so that
    2^(l·log2 e - shift) times it is right; own: the whole gradient at the own class; every: what every class gets;
    length: ∂loss/∂‖x‖.
    """
    program = tl.program_id(0)
    rows = program * ROWS + tl.arange(0, ROWS)
    inside = rows < samples
    base, total, log_total = combine_splits(
        partial_sum_ptr, partial_max_ptr, rows, inside, samples, splits, shift, ONLINE
    )
    other_logsumexp = base * LN2 + log_total
    label = tl.load(label_ptr + rows, mask=inside, other=-1)
    counted = label != -1
    known = label >= 0
    cosine = tl.load(own_cosine_ptr + rows, mask=inside, other=0.0)
    logit_scale = tl.full((ROWS,), 1.0, tl.float32) * scale
    if not NORMALIZE:
        logit_scale = logit_scale * tl.load(length_ptr + rows, mask=inside, other=0.0)
    margin, slope = cosine, tl.full((ROWS,), 1.0, tl.float32)
    if HAS_ANGLE:
        angular = per_class(angular_margin_ptr, angular_margin, label, known, HAS_ANGULAR_VECTOR)
        margin, slope = margin_cosine(cosine, angle_multiplier, angular, ARCFACE, EXACT_GRADIENT)
    subtracted = per_class(cosine_margin_ptr, cosine_margin, label, known, HAS_COSINE_VECTOR)
    own_with_margin = logit_scale * (margin - subtracted)
    z = own_with_margin + per_class(prior_ptr, 0.0, label, known, HAS_PRIOR)

    difference = other_logsumexp - z
    e = exp_of_negative(-tl.abs(difference))
    loss = tl.where(difference > 0.0, difference, 0.0) + log1p(e)
    other_probability = tl.div_rn(tl.where(difference > 0.0, 1.0, e), 1.0 + e)
    own_slope = -other_probability
    every = tl.zeros((ROWS,), tl.float32)
    if SMOOTH:
        logit_sum = add_splits(partial_logit_ptr, rows, inside, samples, splits)
        if HAS_PRIOR:
            logit_sum += tl.load(prior_sum_ptr)
        share = label_smoothing / classes
        mean = (logit_sum - logit_scale * cosine + own_with_margin) / classes
        loss += label_smoothing * (z - mean)
        own_slope += label_smoothing - share
        every -= share
    weight = tl.where(counted, per_class(weight_ptr, class_weight, label, known, HAS_WEIGHT), 0.0)
    loss = tl.where(counted, loss * weight, 0.0)
    tl.store(loss_ptr + rows, loss, mask=inside)

    nothing = (total == 0.0) | (label == -1)
    tile_shift = base + log_total * LOG2E
    rounding = tl.div_rn(tl.exp2(tile_shift - base), tl.where(total == 0.0, 1.0, total))
    other = tl.where(nothing, 0.0, weight * other_probability * rounding)
    own = tl.where(counted, weight * own_slope * slope, 0.0)
    at = coefficients_ptr + rows
    stride = coefficients_stride.to(tl.int64)
    tl.store(at, tl.where(nothing, float("inf"), tile_shift), mask=inside)
    tl.store(at + stride, other, mask=inside)
    tl.store(at + 2 * stride, own, mask=inside)
    tl.store(at + 3 * stride, tl.where(counted, weight * every, 0.0), mask=inside)
    if not NORMALIZE:
        by_length = own_slope * (margin - subtracted - cosine * slope) * scale
        tl.store(at + 4 * stride, tl.where(counted, weight * by_length, 0.0), mask=inside)
    sums = block_sums_ptr + first_block + program
    tl.store(sums, tl.sum(tl.where(inside, loss, 0.0), 0))
    tl.store(sums + blocks, tl.sum(tl.where(inside, weight, 0.0), 0))
    tl.store(sums + 2 * blocks, tl.max(tl.where(inside, tl.maximum(tl.abs(other), tl.abs(own)), 0.0), 0))


@triton.jit(do_not_specialize=["blocks"])
def reduce_kernel(
    # inputs
    block_sums_ptr,
    # outputs
    loss_ptr,
    inverse_total_ptr,
    bound_ptr,
    # sizes
    blocks,
    # constants
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The reduced loss, added up in one order by one program.

    block_sums (3, blocks): losses, weights and the largest coefficients. loss, inverse_total, bound: scalars; the
    second is 1/Σ weights if MEAN (1 for a mean over nothing), else 1; the third is the largest coefficient.
    """
    loss = tl.zeros((BLOCK,), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    bound = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK):
        cells = start + tl.arange(0, BLOCK)
        loss += tl.load(block_sums_ptr + cells, mask=cells < blocks, other=0.0)
        weight += tl.load(block_sums_ptr + blocks + cells, mask=cells < blocks, other=0.0)
        bound = tl.maximum(bound, tl.load(block_sums_ptr + 2 * blocks + cells, mask=cells < blocks, other=0.0))
    total = tl.sum(weight, 0)
    divisor = tl.where((total == 0.0) | (not MEAN), 1.0, total)
    tl.store(loss_ptr, tl.div_rn(tl.sum(loss, 0), divisor))
    tl.store(inverse_total_ptr, 1.0 / divisor)
    tl.store(bound_ptr, tl.max(bound, 0))
