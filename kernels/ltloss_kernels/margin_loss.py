"""The epilogue on the host: from partial sums to losses, the reduced loss, and the coefficients of the backward.

Two launches on N-vectors, whichever device or shard the partial sums come from.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ltloss_kernels.config import tile_table as tiles
from ltloss_kernels.config.chunking import ceil_div
from ltloss_kernels.config.operands import vector
from ltloss_kernels.cosine_logsumexp import Partials
from ltloss_kernels.device.margin_loss import margin_loss_kernel, reduce_kernel

__all__ = ["Margin", "margin_loss"]

PerClass = Tensor | float


class Margin(Protocol):
    """What a margin is made of: cos(multiplier·θ + angle) - cosine, as in ``ltloss.margins``."""

    @property
    def angle(self) -> PerClass:
        """Added to the angle, in radians: a number or (C,)."""

    @property
    def cosine(self) -> PerClass:
        """Subtracted from the cosine: a number or (C,)."""

    @property
    def multiplier(self) -> float:
        """Of the angle."""

    @property
    def beyond_pi(self) -> str:
        """ "monotone" or "arcface"."""

    @property
    def gradient(self) -> str:
        """ "exact" or "straight_through"."""


def margin_loss(
    partials: Partials,
    labels: Tensor,
    log_prior: Tensor | None,
    margin: Margin,
    *,
    class_weight: PerClass | None,
    label_smoothing: float,
    scale: float,
    ignore_index: int | None,
    num_classes: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of N samples and what the backward needs of each; the formulas are with ``margin_loss_kernel``.

    Args:
        partials: of all classes: from one pass, or from passes over shards of the classes, concatenated along S.
        labels: (N,) integers in [0, C), any strides. A label outside is not looked up: its target cosine is NaN.
        log_prior: (C,) of all classes, or None.
        margin: number or (C,) each.
        class_weight: number or (C,); None is 1.
        label_smoothing: ε in [0, 1); needs ``partials.logit_sum`` unless 0.
        scale: s of the pass.
        ignore_index: samples with this label have loss 0, weight 0 and no gradient; None: all count.
        num_classes: C, of all shards.
        reduction: "mean" (Σ weighted loss/Σ weight), "sum" or "none".

    Returns:
        The loss, a scalar or (N,) float32; coefficients (4, N), or (5, N) where features keep their length;
        1/Σ weight for "mean", else 1; and the largest coefficient, both scalars.
    """
    samples = labels.shape[0]
    if label_smoothing > 0.0 and partials.logit_sum is None:
        raise ValueError(f"label_smoothing={label_smoothing} needs partials with a logit_sum; got None")
    losses = torch.empty(samples, dtype=torch.float32, device=labels.device)
    coefficients = losses.new_empty(4 if partials.norm is None else 5, samples)
    block_sums = losses.new_empty(3, ceil_div(samples, tiles.SAMPLE_ROWS))
    prior = vector(log_prior)
    angle_vector, angle = _per_class(margin.angle)
    cosine_vector, cosine = _per_class(margin.cosine)
    weight_vector, weight = _per_class(1.0 if class_weight is None else class_weight)
    has_angle = margin.multiplier != 1.0 or angle_vector is not None or angle != 0.0
    margin_loss_kernel[(block_sums.shape[1],)](
        # inputs
        partials.sum,
        partials.max,
        partials.logit_sum if label_smoothing > 0.0 else None,
        partials.target_cosine,
        partials.norm,
        labels,
        angle_vector,
        cosine_vector,
        prior,
        prior.sum() if prior is not None and label_smoothing > 0.0 else None,
        weight_vector,
        # outputs
        losses,
        coefficients,
        block_sums,
        # sizes
        samples,
        num_classes,
        partials.sum.shape[0],
        labels.stride(0),
        coefficients.stride(0),
        block_sums.shape[1],
        ignore_index,
        partials.shift,
        float(scale),  # an integer would be compiled in
        angle if has_angle else None,
        cosine,
        weight,
        float(margin.multiplier),
        float(label_smoothing),
        # constants
        ARCFACE=margin.beyond_pi == "arcface",
        EXACT_GRADIENT=margin.gradient == "exact",
        ROWS=tiles.SAMPLE_ROWS,
    )
    loss, inverse_total, bound = _reduced(block_sums, reduction == "mean")
    return losses if reduction == "none" else loss, coefficients, inverse_total, bound


def _per_class(values: PerClass) -> tuple[Tensor | None, float]:
    """A vector and nothing, or no vector and a number."""
    return (vector(values), 0.0) if isinstance(values, Tensor) else (None, float(values))


def _reduced(block_sums: Tensor, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """From (3, blocks): the loss, 1/Σ weights (1 unless ``mean``) and the largest coefficient, three scalars."""
    loss, inverse_total, bound = (block_sums.new_empty(()) for _ in range(3))
    reduce_kernel[(1,)](
        # inputs
        block_sums,
        # outputs
        loss,
        inverse_total,
        bound,
        # sizes
        block_sums.shape[1],
        # constants
        MEAN=mean,
        BLOCK=1024,
    )
    return loss, inverse_total, bound
