"""The searches among prototypes: the nearest other prototype of each class, and the k nearest of each feature.

With sub-centres (C, K, D) they search all C·K rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltloss import reference
from ltloss._transforms import apply_of
from ltloss._types import NearestPrototype, TopK
from ltloss.chunked import search as chunked
from ltloss.chunked.search import search_precision
from ltloss.numerics import compute_dtype
from ltloss.ops._dispatch import Kernel, choose_backend, define, distributed, is_sharded, no_gradient
from ltloss.regularizers import mean_angle
from ltloss.runtime import current_workspace

__all__ = [
    "best_classes",
    "min_angle",
    "nearest_in_one_piece",
    "nearest_prototype",
    "rows_for",
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
    """The gradient of a cosine flows to the two prototypes of the pair found, and to no other."""

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
    if prototypes.dim() == 3:
        return _nearest_class(prototypes, rows, allow_tf32)
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
    if prototypes.dim() == 3:
        count, centers, _ = prototypes.shape
        best = top_k_in_one_piece(features, prototypes.flatten(0, -2), rows_for(k, count, centers))
        return best_classes(best, centers, k)
    return top_k_in_one_piece(features, prototypes, k)


def top_k_in_one_piece(features: Tensor, prototypes: Tensor, k: int) -> TopK:
    """The same for a plain tensor of prototypes."""
    features, prototypes = features.detach(), prototypes.detach()
    backend = choose_backend(features, prototypes)
    if backend == "reference":
        return reference.top_k(features, prototypes, k)
    return TopK(*_TOP_K[backend](features, prototypes, k))


def top_k_of_products(features: Tensor, prototypes: Tensor, k: int, bias: Tensor | None) -> TopK:
    """:func:`ltloss.functional.top_k` by x·w + b instead of the cosine, on checked arguments."""
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
    if is_sharded(prototypes) and rows is None and prototypes.dim() == 2:
        angle: Tensor = distributed("nearest").mean_angle_of_all(prototypes, class_counts, power, allow_tf32)
        return angle
    cosine = nearest_prototype(prototypes, rows, allow_tf32).cosine
    if prototypes.shape[0] == 1 or cosine.numel() == 0:
        return (cosine * 0.0).sum()
    if class_counts is None:
        return mean_angle(cosine, torch.ones_like(cosine).detach())
    chosen = class_counts if rows is None else class_counts[rows]
    return mean_angle(cosine, chosen.to(cosine.dtype) ** -power)


def rows_for(k: int, classes: int, centers: int) -> int:
    """How many of the best rows are sure to contain k classes."""
    return min(centers * (k - 1) + 1, classes * centers)


def best_classes(found: TopK, centers: int, k: int) -> TopK:
    """From the best rows (N, R) of prototypes (C·K, D) to the k best classes: each class by the best of its rows."""
    classes, order = (found.index // centers).sort(dim=1, stable=True)
    again = torch.zeros_like(classes, dtype=torch.bool)
    again[:, 1:] = classes[:, 1:] == classes[:, :-1]
    place = order.masked_fill(again, order.shape[1]).sort(dim=1).values[:, :k]
    return TopK(found.cosine.gather(1, place), found.index.gather(1, place) // centers)


def _nearest_class(prototypes: Tensor, classes: Tensor | None, allow_tf32: bool) -> NearestPrototype:
    """:func:`ltloss.functional.nearest_prototype` of prototypes (C, K, D) on checked arguments."""
    if is_sharded(prototypes):
        raise ValueError(
            "prototypes with sub-centres (C, K, D) have no search for the nearest class while they are spread over "
            f"ranks; got {tuple(prototypes.shape)}: take ltloss.distributed.in_one_piece of the module"
        )
    backend = choose_backend(prototypes, prototypes)
    if backend == "reference":
        return reference.nearest_prototype(prototypes, classes)
    if prototypes.shape[0] == 1:
        asked = prototypes[:, 0, 0] if classes is None else prototypes[classes, 0, 0]
        alone = torch.full_like(asked, -1.0, dtype=compute_dtype(asked))
        return NearestPrototype(alone + 0.0 * asked, torch.full_like(asked, -1, dtype=torch.int64))
    flat, centers = prototypes.flatten(0, -2), prototypes.shape[1]
    rows, other = _nearest_pairs(prototypes.detach(), classes, allow_tf32)
    return NearestPrototype(apply_of(_Pairs)(flat, rows, other, backend), other // centers)


def _nearest_pairs(prototypes: Tensor, classes: Tensor | None, allow_tf32: bool) -> tuple[Tensor, Tensor]:
    """For every class one of its rows, and the row of another class that is nearest to any of them."""
    count, centers, _ = prototypes.shape
    own = torch.arange(count, device=prototypes.device) if classes is None else classes
    with search_precision(allow_tf32):  # of the best K + 1 rows, at least one is of another class
        found = top_k(prototypes[own].flatten(0, -2), prototypes.flatten(0, -2), min(centers + 1, count * centers))
    cosine, index = (one.view(len(own), -1) for one in found)  # (R, K·(K+1))
    cosine = cosine.masked_fill(index // centers == own[:, None], -torch.inf)
    best = cosine.amax(1, keepdim=True)
    # Of classes that are equally near the lowest, then the lowest rows.
    equal = torch.where((cosine == best) | cosine.isnan(), index, prototypes.shape[0] * centers)
    place = equal.argmin(1, keepdim=True)
    row = own * centers + place[:, 0] // (index.shape[1] // centers)
    return row, index.gather(1, place)[:, 0]


class _Pairs(torch.autograd.Function):
    """The cosine of given pairs of rows; its gradient goes to both ends."""

    once = True

    @staticmethod
    def forward(ctx: Any, flat: Tensor, rows: Tensor, other: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(flat, rows, other)
        ctx.backend = backend
        dtype = compute_dtype(flat)
        left, right = (reference.direction(flat[one].to(dtype)) for one in (rows, other))
        return (left * right).sum(1).clamp(-1.0, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        flat, rows, other = ctx.saved_tensors
        return _NEAREST_GRADIENT[ctx.backend](grads[0], flat, rows, other), None, None, None
