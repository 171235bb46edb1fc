"""Host side of the epilogue: from partial sums to losses, the reduced loss, and the coefficients of the backward.

It takes one launch on N-vectors, or two for many samples, whichever shards the partial sums come from.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ltloss_kernels.config import tile_table as tiles
from ltloss_kernels.config.chunking import ceil_div
from ltloss_kernels.config.operands import vector
from ltloss_kernels.cosine_logsumexp import Partials
from ltloss_kernels.device.margin_loss import margin_loss_kernel, reduce_kernel
from ltloss_kernels.launching import Launches, layout
from ltloss_kernels.running import on_device

__all__ = ["coefficients", "margin_loss"]

PerClass = Tensor | float


def margin_loss(
    partials: Partials, labels: Tensor, objective: Any, num_classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of N samples, and the coefficients of each for the backward; ``margin_loss_kernel`` has the formulas.

    Args:
        partials: of all classes: from one pass, or from passes over shards of the classes, concatenated along S.
        labels: (N,) integers in [0, C), any strides. A label outside is not looked up: its target cosine is NaN.
        objective: has the attributes of ``ltloss.margins.Objective``. Its ``margin`` has ``angular_margin`` in radians
            and ``cosine_margin``, a number or (C,) each, ``angle_multiplier``, ``turns`` (whether an angle is
            involved), ``beyond_pi`` and ``margin_gradient``. Of its own: ``log_prior`` and ``class_weight``, (C,) or
            None; ``scale``, ``label_smoothing``; ``ignore_index``, None if all samples count; ``reduction``.
        num_classes: C, of all shards.

    Returns:
        The loss, a scalar or (N,) float32; coefficients (4, N), or (5, N) where partials have a norm; 1/Σ weight for
        "mean", else 1, a scalar; and the largest |coefficient| of rows 1 and 2, a scalar.

    Raises:
        ValueError: label smoothing without a ``logit_sum`` in the partials.
        RuntimeError: kernels cannot run on the device of the labels.
    """
    samples, margin, smoothing = labels.shape[0], objective.margin, objective.label_smoothing
    if smoothing > 0.0 and partials.logit_sum is None:
        raise ValueError(f"label_smoothing={smoothing} needs partials with a logit_sum; got None")
    losses = torch.empty(samples, dtype=torch.float32, device=labels.device)
    coefficients = losses.new_empty(4 if partials.norm is None else 5, samples)
    if samples == 0:
        loss = losses if objective.reduction == "none" else losses.new_zeros(())
        return loss, coefficients, losses.new_ones(()), losses.new_zeros(())
    rows = tiles.sample_rows(samples)
    blocks = ceil_div(samples, rows)
    block_sums = None if blocks == 1 else losses.new_empty(3, blocks)
    reduced = [losses.new_empty(()) for _ in range(3)]
    prior = vector(objective.log_prior)
    angle_vector, angle = _per_class(margin.angular_margin)
    cosine_vector, cosine = _per_class(margin.cosine_margin)
    weight_vector, weight = _per_class(1.0 if objective.class_weight is None else objective.class_weight)
    mean = objective.reduction == "mean"
    launch = Launches(
        "margin_loss",
        layout(*partials[:2], *partials[3:6], labels, angle_vector, cosine_vector, prior, weight_vector),
        (
            num_classes,
            smoothing > 0.0,
            margin.turns,
            mean,
            objective.ignore_index,
            margin.beyond_pi,
            margin.margin_gradient,
        ),
    )
    with on_device(losses):
        launch(margin_loss_kernel, (blocks,))(
            # inputs
            partials.sum,
            partials.max,
            partials.logit_sum if smoothing > 0.0 else None,
            partials.target_cosine,
            partials.norm,
            labels,
            angle_vector,
            cosine_vector,
            prior,
            prior.sum() if prior is not None and smoothing > 0.0 else None,
            weight_vector,
            # outputs
            losses,
            coefficients,
            block_sums,
            *reduced,
            # sizes
            samples,
            num_classes,
            partials.sum.shape[0],
            labels.stride(0),
            coefficients.stride(0),
            blocks,
            objective.ignore_index,
            partials.shift,
            float(objective.scale),  # an integer would be compiled in
            angle if margin.turns else None,
            cosine,
            weight,
            float(margin.angle_multiplier),
            float(smoothing),
            # constants
            BEYOND_PI=margin.beyond_pi,
            EXACT_GRADIENT=margin.margin_gradient == "exact",
            MEAN=mean,
            ROWS=rows,
        )
        if block_sums is not None:
            launch(reduce_kernel, (1,))(block_sums, *reduced, blocks, MEAN=mean, BLOCK=1024)
    loss, inverse_weight_sum, max_coefficient = reduced
    return losses if objective.reduction == "none" else loss, coefficients, inverse_weight_sum, max_coefficient


def coefficients(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (4 or 5, N) whose shift is in natural units, as ``gradients`` takes them, and the largest of them.

    Row 0, the shift, becomes float32 in units of log 2. What this rounding loses goes into row 1, d_lse.
    """
    exact = rows[0].double() / math.log(2.0)
    shift = exact.float()
    nothing = (rows[1] == 0) | (rows[0] == -math.inf)
    d_lse = torch.where(nothing, 0.0, rows[1] * torch.exp2(shift.double() - exact).float())
    rows = torch.cat([torch.where(nothing, math.inf, shift)[None], d_lse[None], rows[2:]])
    max_coefficient = rows[1:].abs().amax() if rows.shape[1] else rows.new_zeros(())
    return rows, max_coefficient


def _per_class(values: PerClass) -> tuple[Tensor | None, float]:
    """(vector, 0) for a tensor, (None, number) for a number."""
    return (vector(values), 0.0) if isinstance(values, Tensor) else (None, float(values))
