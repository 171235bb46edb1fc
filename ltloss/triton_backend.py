"""The operators on the Triton kernels: which tensors they serve, and how operator arguments become launches.

Signatures are those of :mod:`ltloss.chunked.logsumexp`, plus the fused operator that only exists here; the
searches are in :mod:`ltloss.triton_search`. Nothing in this module looks at data on the device, so a training step
never waits for the GPU. Imported on first use: it needs Triton.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import ltloss_kernels
import torch
from torch import Tensor

from ltloss._validation import check_label_range
from ltloss.chunked.logsumexp import inverse_norm
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
        if not ltloss_kernels.interpreting():
            raise RuntimeError(
                f"backend 'triton' was asked for tensors on {device}; kernels run on a GPU, or interpreted (slowly) "
                "where the environment variable TRITON_INTERPRET=1 is set before the first use. Use 'auto' or 'torch'"
            )
        return function(*args)

    return checked


def widened(tensor: Tensor) -> Tensor:
    """As it is; float32 for bfloat16 in the interpreter, which multiplies bfloat16 wrongly."""
    return tensor.float() if tensor.dtype == torch.bfloat16 and ltloss_kernels.interpreting() else tensor


class _Margin(NamedTuple):
    """See :class:`ltloss_kernels.Margin`."""

    angle: Tensor | float
    cosine: Tensor | float
    multiplier: float
    beyond_pi: str
    gradient: str


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
    if features.shape[0] == 0:
        nothing = features.new_empty(0, dtype=torch.float32)
        return nothing, nothing.clone(), nothing.clone(), nothing.clone(), nothing.new_zeros(prototypes.shape[0])
    partials = ltloss_kernels.logsumexp_partials(
        widened(features),
        widened(prototypes),
        labels,
        log_prior,
        scale=scale,
        normalize_features=normalize_features,
        with_logit_sum=with_logit_sum,
        ignore_index=None,
    )
    target = partials.target_cosine * scale if partials.norm is None else partials.target_cosine * scale * partials.norm
    # A sum over classes is taken away from others of its size: none of the additions of its parts may round it.
    logit_sum = target.new_empty(0) if partials.logit_sum is None else partials.logit_sum.double().sum(0).float()
    empty = target.new_empty(0)
    feature_inverse = inverse_norm(features, torch.float32) if normalize_features else empty
    prototype_inverse = (partials.class_factor.double() * (math.log(2.0) / scale)).float()
    return _logsumexp(partials), target, logit_sum, feature_inverse, prototype_inverse


def _logsumexp(partials: ltloss_kernels.Partials) -> Tensor:
    """r = log Σ over the parts, (N,) float32, -inf where all are empty.

    In float64: sum and maximum are large numbers that may cancel, and (S, N) is nothing beside the pass itself.
    """
    total = partials.sum.double()
    if partials.max is None:
        return ((partials.shift + total.sum(0).log2()) * math.log(2.0)).float()
    largest = partials.max.double()
    base = largest.amax(0)
    base = torch.where(base == -math.inf, 0.0, base)
    return ((base + (total * torch.exp2(largest - base)).sum(0).log2()) * math.log(2.0)).float()


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
    grad_features, grad_prototypes = ltloss_kernels.logsumexp_gradients(
        zeros.new_ones(()),
        widened(features),
        widened(prototypes),
        labels,
        log_prior,
        coefficients,
        prototype_inverse * (scale / math.log(2.0)),
        None,
        coefficients[1:].abs().amax(),
        scale=scale,
        smooth=grad_sum is not None,
        normalize_features=normalize_features,
        ignore_index=None,
        needs=(needs[0], needs[1]),
        limit=current_workspace(),
    )
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
    if samples == 0:
        scalar = features.new_zeros((), dtype=torch.float32)
        loss = scalar.new_empty(0) if reduction == "none" else scalar
        coefficients = scalar.new_empty(4 if normalize_features else 5, 0)
        return loss, coefficients, scalar.new_zeros(prototypes.shape[0]), scalar + 1.0, scalar.clone()
    partials = ltloss_kernels.logsumexp_partials(
        widened(features),
        widened(prototypes),
        labels,
        log_prior,
        scale=scale,
        normalize_features=normalize_features,
        with_logit_sum=label_smoothing > 0.0,
        ignore_index=ignore_index,
    )
    loss, coefficients, inverse_total, bound = ltloss_kernels.margin_loss(
        partials,
        labels,
        log_prior,
        _Margin(
            angular_margin if angular_margins is None else angular_margins,
            cosine_margin if cosine_margins is None else cosine_margins,
            angle_multiplier,
            beyond_pi,
            margin_gradient,
        ),
        class_weight=class_weight if class_weights is None else class_weights,
        label_smoothing=label_smoothing,
        scale=scale,
        ignore_index=ignore_index,
        num_classes=prototypes.shape[0],
        reduction=reduction,
    )
    return loss, coefficients, partials.class_factor, inverse_total, bound


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
    grad_features, grad_prototypes = ltloss_kernels.logsumexp_gradients(
        grad_loss,
        widened(features),
        widened(prototypes),
        labels,
        log_prior,
        coefficients,
        class_factor,
        inverse_total,
        bound,
        scale=scale,
        smooth=smooth,
        normalize_features=normalize_features,
        ignore_index=ignore_index,
        needs=(needs[0], needs[1]),
        limit=current_workspace(),
    )
    return _as(grad_features, features), _as(grad_prototypes, prototypes)
