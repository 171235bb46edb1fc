"""The operators on the Triton kernels: which tensors they serve, and how operator arguments become launches.

Signatures are those of :mod:`ltloss.chunked.logsumexp`, plus the fused operator that only exists here; the
searches are in :mod:`ltloss.triton_search`. Nothing in this module looks at data on the device, so a training step
never waits for the GPU. Imported on first use: it needs Triton.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from ltloss_kernels.backward_pass import BackwardPass, Upstream
from ltloss_kernels.config import operands
from ltloss_kernels.forward_pass import LOG2E, ForwardPass, Margin, reduce_losses
from torch import Tensor

from ltloss._validation import check_label_range
from ltloss.runtime import current_workspace, debug

__all__ = [
    "cosine_logsumexp",
    "cosine_logsumexp_backward",
    "fused_margin_cross_entropy",
    "fused_margin_cross_entropy_backward",
    "on_device",
    "widened",
]

_Result = TypeVar("_Result")


def on_device(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Refuse what the kernels cannot compute, in words, and run on the tensors' device."""

    @functools.wraps(function)
    def checked(*args: Any) -> _Result:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if device.type == "cuda":
            with torch.cuda.device(device):
                return function(*args)
        if not operands.interpreting():
            raise RuntimeError(
                f"backend 'triton' was asked for tensors on {device}; kernels run on a GPU, or interpreted (slowly) "
                "where the environment variable TRITON_INTERPRET=1 is set before the first use. Use 'auto' or 'torch'"
            )
        return function(*args)

    return checked


def widened(tensor: Tensor) -> Tensor:
    """As it is; float32 for bfloat16 in the interpreter, which multiplies bfloat16 wrongly."""
    return tensor.float() if tensor.dtype == torch.bfloat16 and operands.interpreting() else tensor


def _vector(values: Tensor | None) -> Tensor | None:
    """A (C,) vector as the kernels read it."""
    return None if values is None else values.to(torch.float32).contiguous()


def _as(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient.to(like.dtype)


@on_device
def cosine_logsumexp(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    scale: float,
    normalize_features: bool,
    with_logit_sum: bool,
) -> tuple[Tensor, ...]:
    """See :func:`ltloss.ops.cosine_logsumexp`."""
    samples = features.shape[0]
    other, own = (features.new_empty(samples, dtype=torch.float32) for _ in range(2))
    logit_sum = features.new_empty(samples if with_logit_sum else 0, dtype=torch.float32)
    if samples == 0:
        return other, own, logit_sum, torch.empty_like(other), other.new_zeros(prototypes.shape[0])
    run = ForwardPass(
        widened(features),
        widened(prototypes),
        labels,
        _vector(log_prior),
        scale=scale,
        normalize=normalize_features,
        with_logit_sum=with_logit_sum,
        ignore_index=None,
    )
    for sums in run.chunks():
        run.combine(sums, other, own, logit_sum)
    feature_inverse = run.feature_inverse_norm if normalize_features else other.new_empty(0)
    return other, own, logit_sum, feature_inverse, run.prototype_inverse_norm


@on_device
def cosine_logsumexp_backward(
    grad_other: Tensor | None,
    grad_own: Tensor | None,
    grad_sum: Tensor | None,
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    other_logsumexp: Tensor,
    feature_inverse: Tensor,
    prototype_inverse: Tensor,
    scale: float,
    normalize_features: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """See :func:`ltloss.ops.cosine_logsumexp_backward`."""
    if features.shape[0] == 0:
        return _no_samples(features, prototypes, needs)
    zeros = torch.zeros_like(other_logsumexp)
    a, d, e = (zeros if grad is None else grad.to(torch.float32) for grad in (grad_other, grad_own, grad_sum))
    # The shift in units of log 2 is rounded for a whole row; what that loses goes into the coefficient.
    exact = other_logsumexp.double() / math.log(2.0)
    shift = exact.float()
    nothing = (a == 0) | (other_logsumexp == -math.inf)
    other = torch.where(nothing, 0.0, a * torch.exp2(shift.double() - exact).float())
    shift = torch.where(nothing, math.inf, shift)
    coefficients = torch.stack([shift, other, d + e, e])
    run = BackwardPass(
        widened(features),
        widened(prototypes),
        labels,
        _vector(log_prior),
        prototype_inverse * (scale * LOG2E),
        Upstream(coefficients, zeros.new_ones(()), None, coefficients[1:].abs().amax(), grad_sum is not None),
        scale=scale,
        normalize=normalize_features,
        ignore_index=None,
        limit=current_workspace(),
    )
    grad_features, grad_prototypes = run.gradients(needs[0], needs[1])
    return _as(grad_features, features), _as(grad_prototypes, prototypes)


def _no_samples(features: Tensor, prototypes: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    return (
        features.new_empty(features.shape if needs[0] else 0),
        prototypes.new_zeros(prototypes.shape if needs[1] else 0),
    )


@on_device
def fused_margin_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    angular_margins: Tensor | None,
    cosine_margins: Tensor | None,
    class_weights: Tensor | None,
    angular_margin: float,
    cosine_margin: float,
    class_weight: float,
    scale: float,
    angle_multiplier: float,
    label_smoothing: float,
    ignore_index: int,
    normalize_features: bool,
    beyond_pi: str,
    margin_gradient: str,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`ltloss.ops.fused_margin_cross_entropy`."""
    if labels.device.type == "cpu" or debug:
        check_label_range(labels, prototypes.shape[0], ignore_index)
    samples = features.shape[0]
    losses = features.new_empty(samples, dtype=torch.float32)
    coefficients = losses.new_empty(4 if normalize_features else 5, samples)
    if samples == 0:
        scalar = losses.new_zeros(())
        loss = losses if reduction == "none" else scalar
        return loss, coefficients, losses.new_zeros(prototypes.shape[0]), scalar + 1.0, scalar.clone()
    prior = _vector(log_prior)
    margin = Margin(
        angular_vector=_vector(angular_margins),
        angular=angular_margin,
        cosine_vector=_vector(cosine_margins),
        cosine=cosine_margin,
        weight_vector=_vector(class_weights),
        weight=class_weight,
        prior_sum=None if prior is None or label_smoothing == 0.0 else prior.sum(),
        angle_multiplier=angle_multiplier,
        label_smoothing=label_smoothing,
        arcface_beyond_pi=beyond_pi == "arcface",
        exact_gradient=margin_gradient == "exact",
    )
    run = ForwardPass(
        widened(features),
        widened(prototypes),
        labels,
        prior,
        scale=scale,
        normalize=normalize_features,
        with_logit_sum=label_smoothing > 0.0,
        ignore_index=ignore_index,
    )
    block_sums = losses.new_empty(3, run.blocks(samples))
    for sums in run.chunks():
        run.losses(sums, margin, losses, coefficients, block_sums)
    loss, inverse_total, bound = reduce_losses(block_sums, mean=reduction == "mean")
    loss = losses if reduction == "none" else loss
    return loss, coefficients, run.class_factor, inverse_total, bound


@on_device
def fused_margin_cross_entropy_backward(
    grad_loss: Tensor,
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    coefficients: Tensor,
    class_factor: Tensor,
    inverse_total: Tensor,
    bound: Tensor,
    scale: float,
    smooth: bool,
    ignore_index: int,
    normalize_features: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """See :func:`ltloss.ops.fused_margin_cross_entropy_backward`."""
    if features.shape[0] == 0:
        return _no_samples(features, prototypes, needs)
    run = BackwardPass(
        widened(features),
        widened(prototypes),
        labels,
        _vector(log_prior),
        class_factor,
        Upstream(coefficients, grad_loss, inverse_total, bound, smooth),
        scale=scale,
        normalize=normalize_features,
        ignore_index=ignore_index,
        limit=current_workspace(),
    )
    grad_features, grad_prototypes = run.gradients(needs[0], needs[1])
    return _as(grad_features, features), _as(grad_prototypes, prototypes)
