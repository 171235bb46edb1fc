"""The backend of Triton kernels, as :mod:`ltloss.ops` calls it. Nothing here looks at data on the device.

Imported on first use: it needs Triton.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import ltloss_kernels as kernels
import torch
from torch import Tensor

from ltloss._types import MarginLoss
from ltloss.errors import BackendError
from ltloss.margins import Margin
from ltloss.runtime import current_workspace

__all__ = [
    "coefficients",
    "gradients",
    "logsumexp",
    "margin_loss",
    "nearest_prototype",
    "nearest_prototype_gradient",
    "of_ranks",
    "partials",
    "top_k",
]

_Result = TypeVar("_Result")


def _on_device(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Refuse what the kernels cannot run on, in words, and run on the tensors' device."""

    @functools.wraps(function)
    def run(tensor: Any, *args: Any, **options: Any) -> _Result:
        device = (tensor.sum if isinstance(tensor, kernels.Partials) else tensor).device
        if device.type == "cuda":
            with torch.cuda.device(device):
                return function(tensor, *args, **options)
        if not kernels.interpreting():
            raise BackendError(
                f"backend 'triton' was asked for tensors on {device}; kernels run on a GPU, or interpreted (slowly) "
                "where the environment variable TRITON_INTERPRET=1 is set before the first use. Use 'auto' or 'torch'"
            )
        return function(tensor, *args, **options)

    return run


def _widened(tensor: Tensor) -> Tensor:
    """As it is; float32 for bfloat16 in the interpreter, which multiplies bfloat16 wrongly."""
    return tensor.float() if tensor.dtype == torch.bfloat16 and kernels.interpreting() else tensor


def _vector(values: Tensor | None) -> Tensor | None:
    """A (C,) vector as the kernels read it."""
    return None if values is None else values.to(torch.float32).contiguous()


def _as(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient.to(like.dtype)


@_on_device
def partials(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    scale: float,
    normalize_features: bool,
    with_logit_sum: bool,
    ignore_index: int | None,
) -> kernels.Partials:
    """As :func:`ltloss.chunked.logsumexp.partials`; ``max`` in units of log 2, or None beside one fixed ``shift``."""
    if features.shape[0] == 0:
        nothing = features.new_empty(0, dtype=torch.float32)
        factor = nothing.new_zeros(prototypes.shape[0])
        logit_sum = nothing[None] if with_logit_sum else None
        return kernels.Partials(
            nothing[None], nothing[None], 0.0, logit_sum, nothing, None if normalize_features else nothing, factor
        )
    return kernels.logsumexp_partials(
        _widened(features),
        _widened(prototypes),
        labels,
        _vector(log_prior),
        scale=scale,
        normalize_features=normalize_features,
        with_logit_sum=with_logit_sum,
        ignore_index=ignore_index,
    )


def of_ranks(logsumexp: Tensor) -> kernels.Partials:
    """Log-sum-exps (S, N) of parts of the classes, as partial sums."""
    maximum = logsumexp / math.log(2.0)
    return kernels.Partials(torch.ones_like(maximum), maximum, 0.0, None, maximum[0], None, maximum[0])


def logsumexp(partials: kernels.Partials) -> Tensor:
    """log Σ exp over the other classes, (N,) in float64; -inf where there is no other."""
    total = partials.sum.double()
    maximum = torch.full_like(total, partials.shift) if partials.max is None else partials.max.double()
    largest = maximum.amax(0)
    base = torch.where(largest == -math.inf, 0.0, largest)
    return (base + (total * torch.exp2(maximum - base)).sum(0).log2()) * math.log(2.0)


@_on_device
def margin_loss(
    partials: kernels.Partials,
    labels: Tensor,
    log_prior: Tensor | None,
    class_weight: Tensor | None,
    margin: Margin,
    *,
    scale: float,
    label_smoothing: float,
    ignore_index: int,
    num_classes: int,
    reduction: str,
) -> MarginLoss:
    """As :func:`ltloss.chunked.logsumexp.margin_loss`, in one launch, and one more for the reduction."""
    if labels.shape[0] == 0:
        none = partials.sum.new_empty(0)
        zero = none.new_zeros(())
        rows = partials.sum.new_empty(4 if partials.norm is None else 5, 0)
        return MarginLoss(none if reduction == "none" else zero, rows, zero + 1.0, zero.clone())
    angle, cosine = (_vector(value) if isinstance(value, Tensor) else value for value in margin[:2])
    return MarginLoss(
        *kernels.margin_loss(
            partials,
            labels,
            _vector(log_prior),
            Margin(angle, cosine, *margin[2:]),  # type: ignore[arg-type]
            class_weight=_vector(class_weight),
            label_smoothing=label_smoothing,
            scale=scale,
            ignore_index=ignore_index,
            num_classes=num_classes,
            reduction=reduction,
        )
    )


def coefficients(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (4 or 5, N) as PyTorch has them -> as the kernels take them, and the largest.

    The shift in units of log 2 is rounded for a whole row; what that loses goes into the coefficient.
    """
    exact = rows[0].double() / math.log(2.0)
    shift = exact.float()
    nothing = (rows[1] == 0) | (rows[0] == -math.inf)
    by_lse = torch.where(nothing, 0.0, rows[1] * torch.exp2(shift.double() - exact).float())
    rows = torch.cat([torch.where(nothing, math.inf, shift)[None], by_lse[None], rows[2:]])
    bound = rows[1:].abs().amax() if rows.shape[1] else rows.new_zeros(())
    return rows, bound


@_on_device
def gradients(
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
    normalize_features: bool,
    ignore_index: int | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """As :func:`ltloss.chunked.logsumexp.gradients`."""
    if features.shape[0] == 0:
        return (
            features.new_empty(features.shape if needs[0] else 0),
            prototypes.new_zeros(prototypes.shape if needs[1] else 0),
        )
    grad_features, grad_prototypes = kernels.logsumexp_gradients(
        grad_loss,
        _widened(features),
        _widened(prototypes),
        labels,
        _vector(log_prior),
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


@_on_device
def nearest_prototype(prototypes: Tensor, rows: Tensor | None, exact: bool) -> tuple[Tensor, Tensor]:
    """As :func:`ltloss.chunked.search.nearest_prototype`."""
    count = prototypes.shape[0] if rows is None else rows.shape[0]
    if prototypes.shape[0] == 1 or count == 0:
        alone = torch.full((count,), -1, dtype=torch.int64, device=prototypes.device)
        return alone.to(torch.float32), alone
    return kernels.nearest_prototype(_widened(prototypes), rows, "ieee" if exact else None)


@_on_device
def nearest_prototype_gradient(grad_cosine: Tensor, prototypes: Tensor, rows: Tensor | None, index: Tensor) -> Tensor:
    """As :func:`ltloss.chunked.search.nearest_prototype_gradient`."""
    if prototypes.shape[0] == 1 or index.numel() == 0:
        return torch.zeros(prototypes.shape, dtype=prototypes.dtype, device=prototypes.device)
    return kernels.nearest_prototype_gradient(grad_cosine, _widened(prototypes), rows, index).to(prototypes.dtype)


@_on_device
def top_k(features: Tensor, prototypes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As :func:`ltloss.chunked.search.top_k`."""
    if features.shape[0] == 0:
        return features.new_empty((0, k), dtype=torch.float32), features.new_empty((0, k), dtype=torch.int64)
    return kernels.top_k(_widened(features), _widened(prototypes), k, current_workspace())
