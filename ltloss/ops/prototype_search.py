"""The searches among prototypes: the nearest other one of each class, and the k nearest of each feature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltloss import reference
from ltloss._transforms import apply_of
from ltloss._types import NearestPrototype, TopK
from ltloss.chunked import search as chunked
from ltloss.numerics import compute_dtype
from ltloss.ops._dispatch import Kernel, choose_backend, define, distributed, is_sharded, no_gradient
from ltloss.regularizers import mean_angle
from ltloss.runtime import current_workspace

__all__ = [
    "min_angle",
    "nearest_in_one_piece",
    "nearest_prototype",
    "top_k",
    "top_k_in_one_piece",
    "top_k_of_products",
]


def _fake_nearest(prototypes: Tensor, rows: Tensor | None, allow_tf32: bool) -> tuple[Tensor, Tensor]:
    length = prototypes.shape[0] if rows is None else rows.shape[0]
    dtype = compute_dtype(prototypes)
    return prototypes.new_empty(length, dtype=dtype), prototypes.new_empty(length, dtype=torch.int64)


_NEAREST = define(
    "nearest_prototype(Tensor prototypes, Tensor? rows, bool allow_tf32) -> (Tensor cosine, Tensor index)",
    _fake_nearest,
    torch=chunked.nearest_prototype,
    triton=Kernel("nearest_prototype"),
)
_NEAREST_GRADIENT = define(
    "nearest_prototype_gradient(Tensor grad_cosine, Tensor prototypes, Tensor? rows, Tensor index) -> Tensor",
    lambda grad_cosine, prototypes, rows, index: prototypes.new_empty(prototypes.shape),
    torch=chunked.nearest_prototype_gradient,
    triton=Kernel("nearest_prototype_gradient"),
)
_TOP_K = define(
    "top_k(Tensor features, Tensor prototypes, int k) -> (Tensor cosine, Tensor index)",
    lambda features, prototypes, k: (
        features.new_empty((features.shape[0], k), dtype=compute_dtype(features, prototypes)),
        features.new_empty((features.shape[0], k), dtype=torch.int64),
    ),
    torch=chunked.top_k,
    triton=Kernel("top_k", {"limit": current_workspace}),
)
OPERATORS = {
    "nearest_prototype": _NEAREST,
    "nearest_prototype_gradient": _NEAREST_GRADIENT,
    "top_k": _TOP_K,
}
no_gradient(_NEAREST_GRADIENT)
no_gradient(_TOP_K)


class _Nearest(torch.autograd.Function):
    """The gradient of a cosine goes along the found pair only, to both of its ends."""

    once = True

    @staticmethod
    def forward(ctx: Any, prototypes: Tensor, rows: Tensor | None, allow_tf32: bool, backend: str) -> Any:
        cosine, index = _NEAREST[backend](prototypes, rows, allow_tf32)
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(prototypes, rows, index)
        ctx.backend = backend
        return cosine, index

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        prototypes, rows, index = ctx.saved_tensors
        return _NEAREST_GRADIENT[ctx.backend](grads[0], prototypes, rows, index), None, None, None


def nearest_prototype(prototypes: Tensor, rows: Tensor | None, allow_tf32: bool) -> NearestPrototype:
    """:func:`ltloss.functional.nearest_prototype` on checked arguments, ``rows`` int64."""
    if is_sharded(prototypes):
        found: NearestPrototype = distributed("nearest").nearest_prototype(prototypes, rows, allow_tf32)
        return found
    return nearest_in_one_piece(prototypes, rows, allow_tf32)


def nearest_in_one_piece(prototypes: Tensor, rows: Tensor | None, allow_tf32: bool) -> NearestPrototype:
    """The same for a plain tensor of prototypes."""
    backend = choose_backend(prototypes, prototypes)
    if backend == "reference":
        return reference.nearest_prototype(prototypes, rows)
    return NearestPrototype(*apply_of(_Nearest)(prototypes, rows, allow_tf32, backend))


def top_k(features: Tensor, prototypes: Tensor, k: int) -> TopK:
    """:func:`ltloss.functional.top_k` on checked arguments."""
    if is_sharded(prototypes):
        found: TopK = distributed("top_k").top_k(features, prototypes, k)
        return found
    return top_k_in_one_piece(features, prototypes, k)


def top_k_in_one_piece(features: Tensor, prototypes: Tensor, k: int) -> TopK:
    """The same for a plain tensor of prototypes."""
    features, prototypes = features.detach(), prototypes.detach()
    backend = choose_backend(features, prototypes)
    if backend == "reference":
        return reference.top_k(features, prototypes, k)
    return TopK(*_TOP_K[backend](features, prototypes, k))


def top_k_of_products(features: Tensor, prototypes: Tensor, k: int, bias: Tensor | None) -> TopK:
    """Of x·w + b instead of cosines, on checked arguments."""
    if is_sharded(prototypes):
        found: TopK = distributed("top_k").top_k(features, prototypes, k, normalize_prototypes=False, bias=bias)
        return found
    if choose_backend(features, prototypes) == "reference":
        return reference.top_k(features, prototypes, k, normalize_prototypes=False, bias=bias)
    _, *best = chunked.top_k_of_products(features.detach(), prototypes.detach(), k, bias)
    return TopK(*best)


def min_angle(
    prototypes: Tensor, class_counts: Tensor | None, power: float, rows: Tensor | None, allow_tf32: bool
) -> Tensor:
    """:func:`ltloss.functional.min_angle_regularizer` on checked arguments."""
    if is_sharded(prototypes) and rows is None:
        angle: Tensor = distributed("nearest").mean_angle_of_all(prototypes, class_counts, power, allow_tf32)
        return angle
    cosine = nearest_prototype(prototypes, rows, allow_tf32).cosine
    if prototypes.shape[0] == 1 or cosine.numel() == 0:
        return (cosine * 0.0).sum()
    if class_counts is None:
        return mean_angle(cosine, torch.ones_like(cosine).detach())
    chosen = class_counts if rows is None else class_counts[rows]
    return mean_angle(cosine, chosen.to(cosine.dtype) ** -power)
