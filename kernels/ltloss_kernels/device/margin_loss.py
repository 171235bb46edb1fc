"""The epilogue on N-vectors: margin, loss, coefficients for the backward, and the reduction."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from ltloss_kernels.device.elementary import ANGLE_FLOOR, LN2, LOG2E, PI, arccos, exp_of_negative, log1p, sine_cosine
from ltloss_kernels.device.logsumexp_forward import add_splits, combine_splits

__all__ = ["margin_cosine", "margin_loss_kernel", "reduce_kernel"]


@triton.jit
def margin_cosine(cosine, multiplier, angular, BEYOND_PI: tl.constexpr, EXACT_GRADIENT: tl.constexpr):
    """(value, slope): cos(phase) with phase = m1·θ + m2, continued beyond π, and its derivative for cos θ.

    As in ``ltloss.margins``. BEYOND_PI says how the value goes on where the phase exceeds π:

        "monotone"  (-1)^k·cos(phase) - 2k on the k-th stretch of length π
        "arcface"   cos θ - m2·sin m2
        "cosine"    cos(phase)
        "clip"      cos of the phase clipped to [0, π]
        "easy"      cos(phase), but the margin applies only where cos θ > 0; elsewhere the value is cos θ

    The slope is m1·sin(phase)/sin θ (with the same continuation), with θ kept ANGLE_FLOOR away from 0 and π; it is 1
    unless EXACT_GRADIENT.
    """
    theta = arccos(cosine)
    phase = multiplier * theta + angular
    _, cos_phase = sine_cosine(phase)
    if BEYOND_PI == "arcface":
        sin_margin, _ = sine_cosine(angular)
        value = tl.where(phase > PI, cosine - angular * sin_margin, cos_phase)
    elif BEYOND_PI == "easy":
        value = tl.where(cosine > 0.0, cos_phase, cosine)
    elif BEYOND_PI == "clip":
        value = tl.where(phase > PI, -1.0, tl.where(phase < 0.0, 1.0, cos_phase))
    elif BEYOND_PI == "cosine":
        value = cos_phase
    else:
        stretch = tl.maximum(tl.floor(tl.div_rn(phase, tl.full(phase.shape, PI, tl.float32))), 0.0)
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
        if BEYOND_PI == "arcface":
            steep = tl.where(phase > PI, 1.0, steep)
        elif BEYOND_PI == "easy":
            steep = tl.where(cosine > 0.0, steep, 1.0)
        elif BEYOND_PI == "clip":
            steep = tl.where((phase < 0.0) | (phase > PI), 0.0, steep)
        elif BEYOND_PI == "monotone":
            stretch = tl.maximum(tl.floor(tl.div_rn(phase, tl.full(phase.shape, PI, tl.float32))), 0.0)
            steep = (1.0 - 2.0 * (stretch - 2.0 * tl.floor(0.5 * stretch))) * steep
        slope = tl.where(plain, 1.0, steep)
    return value, slope


@triton.jit
def per_class(vector_ptr, number, classes_of_rows, known):
    """The entry of each row's class in a vector (classes,), 0 where not ``known``; ``number`` if the vector is None."""
    values = tl.full(classes_of_rows.shape, 1.0, tl.float32) * number
    if vector_ptr is not None:
        values = tl.load(vector_ptr + classes_of_rows, mask=known, other=0.0).to(tl.float32)
    return values


@triton.jit(do_not_specialize=["samples", "classes", "splits", "coefficients_stride", "blocks"])
def margin_loss_kernel(
    # inputs
    partial_sum_ptr,
    partial_max_ptr,
    partial_logit_ptr,
    target_cosine_ptr,
    norm_ptr,
    labels_ptr,
    angle_ptr,
    cosine_ptr,
    prior_ptr,
    prior_sum_ptr,
    weight_ptr,
    # outputs
    loss_ptr,
    coefficients_ptr,
    block_sums_ptr,
    reduced_ptr,
    inverse_weight_sum_ptr,
    max_coefficient_ptr,
    # sizes
    samples,
    classes,
    splits,
    labels_stride,
    coefficients_stride,
    blocks,
    ignore_index,
    shift,
    scale,
    angle_margin,
    cosine_margin,
    class_weight,
    angle_multiplier,
    label_smoothing,
    # constants
    BEYOND_PI: tl.constexpr,
    EXACT_GRADIENT: tl.constexpr,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """From partial sums to weighted losses, their sums, and the coefficients of the backward; ROWS samples per program.

    r is the log-sum-exp over the other classes, s' the scale: s, or s·‖x‖ where there is a norm. t = s'·cos θ is the
    target logit without margin and prior, z' = s'·(cos(m1·θ + m2) - m3), and z = z' + b_y. ε is the label smoothing,
    and p = σ(r - z) the probability of all other classes together:

        loss = softplus(r - z) + ε·(z - mean),   mean = (Σ_c l_c - t + z')/C
        ∂loss/∂r = p,   ∂loss/∂z' = -p + ε - ε/C,   ∂loss/∂(Σ_c l_c) = -ε/C,   ∂loss/∂t = ∂loss/∂z'·slope + ε/C

    Inputs:
        partial_sum, partial_max, partial_logit (splits, samples), see cosine_logsumexp_kernel. partial_max is None
            where ``shift`` serves, and partial_logit where ε = 0.
        target_cosine, norm (samples,); norm may be None.
        labels (samples,): any integers. ``ignore_index`` (or None) does not count; nothing is read for a label outside
            [0, classes).
        angle (m2), cosine (m3), prior (b), weight (classes,); for one that is None the number angle_margin,
            cosine_margin, 0 or class_weight holds for all classes. If angle_margin is None, no angle is computed.
        prior_sum: a scalar, Σ_c b_c, for ε > 0; or None.
    Outputs:
        loss (samples,): times the weight of the class; 0 where ignored.
        block_sums (3, blocks): Σ loss, Σ weight and the largest coefficient of each program. None for a single program,
            which then writes the scalars reduced, inverse_weight_sum and max_coefficient itself: see store_reduced.
        coefficients (4, samples), or (5, samples) with a norm, all but the shift times the weight of the class:

            0  shift     r in units of log 2, rounded to float32
            1  d_lse     ∂loss/∂r, corrected for the rounding of row 0, so that d_lse·2^(l·log2 e - shift) is right
            2  d_target  the whole gradient of the target logit t
            3  d_all     what label smoothing adds to the gradient of every other logit
            4  d_norm    the part of ∂loss/∂‖x‖ that does not flow through the logits
    """
    program = tl.program_id(0)
    rows = program * ROWS + tl.arange(0, ROWS)
    inside = rows < samples
    base, total, log_total = combine_splits(partial_sum_ptr, partial_max_ptr, rows, inside, samples, splits, shift)
    logsumexp = base * LN2 + log_total
    label = tl.load(labels_ptr + rows.to(tl.int64) * labels_stride, mask=inside, other=0).to(tl.int64)
    counted = inside
    if ignore_index is not None:
        counted = inside & (label != ignore_index)
    known = counted & (label >= 0) & (label < classes)
    cosine = tl.load(target_cosine_ptr + rows, mask=inside, other=0.0)
    logit_scale = tl.full((ROWS,), 1.0, tl.float32) * scale
    if norm_ptr is not None:
        logit_scale = logit_scale * tl.load(norm_ptr + rows, mask=inside, other=0.0)
    margin, slope = cosine, tl.full((ROWS,), 1.0, tl.float32)
    if angle_margin is not None:
        angle = per_class(angle_ptr, angle_margin, label, known)
        margin, slope = margin_cosine(cosine, angle_multiplier, angle, BEYOND_PI, EXACT_GRADIENT)
    subtracted = per_class(cosine_ptr, cosine_margin, label, known)
    with_margin = logit_scale * (margin - subtracted)
    z = with_margin + per_class(prior_ptr, 0.0, label, known)

    difference = logsumexp - z
    e = exp_of_negative(-tl.abs(difference))
    loss = tl.where(difference > 0.0, difference, 0.0) + log1p(e)
    other_probability = tl.div_rn(tl.where(difference > 0.0, 1.0, e), 1.0 + e)
    target_slope = -other_probability
    d_all = tl.zeros((ROWS,), tl.float32)
    if partial_logit_ptr is not None:
        logit_sum = add_splits(partial_logit_ptr, rows, inside, samples, splits)
        if prior_ptr is not None:
            logit_sum += tl.load(prior_sum_ptr)
        share = label_smoothing / classes
        mean = (logit_sum - logit_scale * cosine + with_margin) / classes
        loss += label_smoothing * (z - mean)
        target_slope += label_smoothing - share
        d_all -= share
    weight = tl.where(counted, per_class(weight_ptr, class_weight, label, known), 0.0)
    loss = tl.where(counted, loss * weight, 0.0)
    tl.store(loss_ptr + rows, loss, mask=inside)

    nothing = (total == 0.0) | ~counted
    tile_shift = base + log_total * LOG2E
    rounding = tl.div_rn(tl.exp2(tile_shift - base), tl.where(total == 0.0, 1.0, total))
    d_lse = tl.where(nothing, 0.0, weight * other_probability * rounding)
    d_target = tl.where(counted, weight * target_slope * slope, 0.0)
    at = coefficients_ptr + rows
    stride = coefficients_stride.to(tl.int64)
    tl.store(at, tl.where(nothing, float("inf"), tile_shift), mask=inside)
    tl.store(at + stride, d_lse, mask=inside)
    tl.store(at + 2 * stride, d_target, mask=inside)
    tl.store(at + 3 * stride, tl.where(counted, weight * d_all, 0.0), mask=inside)
    if norm_ptr is not None:
        d_norm = target_slope * (margin - subtracted - cosine * slope) * scale
        tl.store(at + 4 * stride, tl.where(counted, weight * d_norm, 0.0), mask=inside)
    loss_sum = tl.sum(tl.where(inside, loss, 0.0), 0)
    weight_sum = tl.sum(tl.where(inside, weight, 0.0), 0)
    largest = tl.max(tl.where(inside, tl.maximum(tl.abs(d_lse), tl.abs(d_target)), 0.0), 0)
    if block_sums_ptr is None:
        store_reduced(reduced_ptr, inverse_weight_sum_ptr, max_coefficient_ptr, loss_sum, weight_sum, largest, MEAN)
    else:
        sums = block_sums_ptr + program
        tl.store(sums, loss_sum)
        tl.store(sums + blocks, weight_sum)
        tl.store(sums + 2 * blocks, largest)


@triton.jit
def store_reduced(
    loss_ptr, inverse_weight_sum_ptr, max_coefficient_ptr, loss_sum, weight_sum, largest, MEAN: tl.constexpr
):
    """Store the scalars of a batch: the reduced loss; 1/Σ weights if MEAN (1 if that sum is 0), else 1; the largest.

    The reduced loss is the mean if MEAN, else the sum.
    """
    divisor = tl.where((weight_sum == 0.0) | (not MEAN), 1.0, weight_sum)
    tl.store(loss_ptr, tl.div_rn(loss_sum, divisor))
    tl.store(inverse_weight_sum_ptr, 1.0 / divisor)
    tl.store(max_coefficient_ptr, largest)


@triton.jit(do_not_specialize=["blocks"])
def reduce_kernel(
    # inputs
    block_sums_ptr,
    # outputs
    loss_ptr,
    inverse_weight_sum_ptr,
    max_coefficient_ptr,
    # sizes
    blocks,
    # constants
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the blocks' sums in a fixed order, by one program, and store the scalars of store_reduced.

    block_sums (3, blocks): Σ loss, Σ weight and the largest coefficient of each block.
    """
    loss = tl.zeros((BLOCK,), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK):
        cells = start + tl.arange(0, BLOCK)
        loss += tl.load(block_sums_ptr + cells, mask=cells < blocks, other=0.0)
        weight += tl.load(block_sums_ptr + blocks + cells, mask=cells < blocks, other=0.0)
        largest = tl.maximum(largest, tl.load(block_sums_ptr + 2 * blocks + cells, mask=cells < blocks, other=0.0))
    store_reduced(
        loss_ptr, inverse_weight_sum_ptr, max_coefficient_ptr, tl.sum(loss, 0), tl.sum(weight, 0), tl.max(largest, 0),
        MEAN,
    )  # fmt: skip
