"""The operators: schema, shapes for the compiler, and which implementation runs where. The only door to the kernels.

Every operator takes and returns plain tensors and allocates nothing of size N×C. Gradients are attached in
:mod:`ltloss.autograd`. A faster implementation for a device goes into :func:`_implementation`, nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltloss import cpu, cpu_search
from ltloss.backend import current_backend, debug

__all__ = [
    "checked_labels",
    "cosine_logsumexp",
    "cosine_logsumexp_backward",
    "nearest_prototype",
    "nearest_prototype_backward",
    "top_k",
]


def _checked_labels(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    labels = labels.to(torch.int64, copy=True)
    ignored = labels == ignore_index
    if labels.device.type == "cpu" or debug:
        bad = ((labels < 0) | (labels >= num_classes)) & ~ignored
        if bool(bad.any()):
            first = int(bad.nonzero()[0, 0])
            raise IndexError(
                f"labels must lie in [0, {num_classes}) or be ignore_index={ignore_index}; "
                f"got {int(labels[first])} at position {first} ({int(bad.sum())} such labels in all)"
            )
    return labels.masked_fill_(ignored, -1)


_CHUNKED: dict[str, Callable[..., Any]] = {
    "cosine_logsumexp": cpu.cosine_logsumexp,
    "cosine_logsumexp_backward": cpu.cosine_logsumexp_backward,
    "nearest_prototype": cpu_search.nearest_prototype,
    "nearest_prototype_backward": cpu_search.nearest_prototype_backward,
    "top_k": cpu_search.top_k,
    "checked_labels": _checked_labels,
}

# Operators that have a kernel in ltloss_kernels; empty in this version.
_KERNELS: dict[str, Callable[..., Any]] = {}


def kernels_available() -> bool:
    """Whether this version brings GPU kernels that can run here."""
    return bool(_KERNELS)


def _implementation(name: str, device: torch.device) -> Callable[..., Any]:
    """The one place that decides what runs: the kernel where there is one for the device, chunked PyTorch otherwise."""
    backend = current_backend()
    if backend == "triton" and name not in _KERNELS and name != "checked_labels":
        raise RuntimeError(
            f"backend 'triton' was asked for, but this version has no kernel for {name}; use 'auto' or 'torch'"
        )
    if name in _KERNELS and (backend == "triton" or (backend == "auto" and device.type == "cuda")):
        return _KERNELS[name]
    return _CHUNKED[name]


def _define(schema: str, fake: Callable[..., Any]) -> Any:
    """Register an operator whose implementation is looked up at each call; return the callable operator."""
    name = schema.partition("(")[0]
    torch.library.define(f"ltloss::{name}", schema.removeprefix(name), tags=torch.Tag.pt2_compliant_tag)

    def dispatch(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if not torch.is_autocast_enabled(device.type):
            return _implementation(name, device)(*args)
        with torch.autocast(device.type, enabled=False):  # else the products inside would drop to half precision
            return _implementation(name, device)(*args)

    torch.library.impl(f"ltloss::{name}", "default", dispatch)
    torch.library.register_fake(f"ltloss::{name}", fake)
    return getattr(torch.ops.ltloss, name).default


def _statistics_dtype(*tensors: Tensor) -> torch.dtype:
    return cpu.compute_dtype(*tensors)


def _fake_cosine_logsumexp(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    scale: float,
    normalize_features: bool,
    with_logit_sum: bool,
) -> tuple[Tensor, ...]:
    dtype = _statistics_dtype(features, prototypes)
    n, c = features.shape[0], prototypes.shape[0]
    lengths = (n, n, n if with_logit_sum else 0, n if normalize_features else 0, c)
    return tuple(features.new_empty(length, dtype=dtype) for length in lengths)


def _fake_cosine_logsumexp_backward(*args: Any) -> tuple[Tensor, Tensor]:
    features, prototypes, needs = args[3], args[4], args[-1]
    return (
        features.new_empty(features.shape) if needs[0] else features.new_empty(0),
        prototypes.new_empty(prototypes.shape) if needs[1] else prototypes.new_empty(0),
    )


def _fake_nearest_prototype(prototypes: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    length = prototypes.shape[0] if rows is None else rows.shape[0]
    dtype = _statistics_dtype(prototypes)
    return prototypes.new_empty(length, dtype=dtype), prototypes.new_empty(length, dtype=torch.int64)


def _fake_nearest_prototype_backward(
    grad_cosine: Tensor, prototypes: Tensor, rows: Tensor | None, index: Tensor
) -> Tensor:
    return prototypes.new_empty(prototypes.shape)


def _fake_top_k(features: Tensor, prototypes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (features.shape[0], k)
    dtype = _statistics_dtype(features, prototypes)
    return features.new_empty(shape, dtype=dtype), features.new_empty(shape, dtype=torch.int64)


cosine_logsumexp = _define(
    "cosine_logsumexp(Tensor features, Tensor prototypes, Tensor labels, Tensor? log_prior, float scale, "
    "bool normalize_features, bool with_logit_sum) -> (Tensor other_logsumexp, Tensor own_logit, Tensor logit_sum, "
    "Tensor feature_inverse_norm, Tensor prototype_inverse_norm)",
    _fake_cosine_logsumexp,
)
"""One pass over the prototypes.

Inputs: features (N, D), prototypes (C, D), labels (N,) int64 where anything outside [0, C) means "no own class here",
log_prior (C,) or None. Outputs, in float32 (float64 for float64 inputs): other_logsumexp (N,) = log Σ_{c≠y} exp(l_c)
with l_c = s·cos_c + log_prior_c, -inf where there is no other class; own_logit (N,) = s·cos_y *without* the prior, 0
without own class; logit_sum (N,) = Σ_c s·cos_c over all classes, or (0,) unless asked for; 1/‖x‖ (N,), or (0,) when
the features keep their length (every s·cos is then s·‖x‖·cos); 1/‖w‖ (C,). Zero rows have inverse norm 0. The last
two are for the backward.
"""

cosine_logsumexp_backward = _define(
    "cosine_logsumexp_backward(Tensor? grad_other, Tensor? grad_own, Tensor? grad_sum, Tensor features, "
    "Tensor prototypes, Tensor labels, Tensor? log_prior, Tensor other_logsumexp, Tensor feature_inverse_norm, "
    "Tensor prototype_inverse_norm, float scale, bool normalize_features, bool[] needs) -> (Tensor, Tensor)",
    _fake_cosine_logsumexp_backward,
)
"""Gradients for features (N, D) and prototypes (C, D), each in its input's dtype; (0,) where ``needs`` is False."""

nearest_prototype = _define(
    "nearest_prototype(Tensor prototypes, Tensor? rows) -> (Tensor cosine, Tensor index)", _fake_nearest_prototype
)
"""For every prototype, or for those in ``rows`` (R,), the largest cosine to any other one and its (lowest) index."""

nearest_prototype_backward = _define(
    "nearest_prototype_backward(Tensor grad_cosine, Tensor prototypes, Tensor? rows, Tensor index) -> Tensor",
    _fake_nearest_prototype_backward,
)
"""Gradient (C, D) along the found pairs only, deterministic also where several rows share one nearest prototype."""

top_k = _define("top_k(Tensor features, Tensor prototypes, int k) -> (Tensor cosine, Tensor index)", _fake_top_k)
"""The k classes with the largest cosine per feature, best first, equal cosines in class order: two (N, k)."""


# An operator, so that torch.compile does not have to look into a check that depends on the data.
checked_labels = _define(
    "checked_labels(Tensor labels, int num_classes, int ignore_index) -> Tensor",
    lambda labels, num_classes, ignore_index: labels.new_empty(labels.shape, dtype=torch.int64),
)
"""Labels as int64 with the ignored ones turned into -1. On the CPU (on a GPU under ``ltloss.debug``) a label that is
neither in [0, C) nor ``ignore_index`` raises IndexError."""
