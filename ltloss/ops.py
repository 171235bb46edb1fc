"""The operators: schema, shapes for the compiler, and which implementation runs where. The only door to the kernels.

Every operator takes and returns plain tensors and allocates nothing of size N×C. Gradients are attached in
:mod:`ltloss.autograd`. A faster implementation for a device goes into :func:`_implementation`, nowhere else.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ltloss._validation import check_label_range
from ltloss.chunked import logsumexp as cpu
from ltloss.chunked import search as cpu_search
from ltloss.runtime import current_backend, debug

__all__ = [
    "checked_labels",
    "cosine_logsumexp",
    "cosine_logsumexp_backward",
    "distributed",
    "fused_margin_cross_entropy",
    "fused_margin_cross_entropy_backward",
    "is_sharded",
    "kernels_chosen",
    "nearest_prototype",
    "nearest_prototype_backward",
    "top_k",
]


def _checked_labels(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    labels = labels.to(torch.int64, copy=True)
    if labels.device.type == "cpu" or debug:
        check_label_range(labels, num_classes, ignore_index)
    return labels.masked_fill_(labels == ignore_index, -1)


_CHUNKED: dict[str, Callable[..., Any]] = {
    "cosine_logsumexp": cpu.cosine_logsumexp,
    "cosine_logsumexp_backward": cpu.cosine_logsumexp_backward,
    "nearest_prototype": cpu_search.nearest_prototype,
    "nearest_prototype_backward": cpu_search.nearest_prototype_backward,
    "top_k": cpu_search.top_k,
    "checked_labels": _checked_labels,
}

# Operators that have kernels: the module that launches them, and where among their arguments the two matrices stand.
_KERNELS = {
    "cosine_logsumexp": ("triton_backend", (0, 1)),
    "cosine_logsumexp_backward": ("triton_backend", (3, 4)),
    "nearest_prototype": ("triton_search", (0, 0)),
    "nearest_prototype_backward": ("triton_search", (1, 1)),
    "top_k": ("triton_search", (0, 1)),
}
# Operators that only exist as kernels: they are called where `kernels_chosen` says so.
_FUSED = ("fused_margin_cross_entropy", "fused_margin_cross_entropy_backward")

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WIDEST_KERNEL = 8192


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None  # looked up, not imported
    except ImportError:
        return False


_HAS_TRITON = _has_triton()


def is_sharded(prototypes: Tensor) -> bool:
    """Whether the classes are spread over ranks, or sampled: then :mod:`ltloss.distributed` does the wide work."""
    return hasattr(prototypes, "device_mesh") or hasattr(prototypes, "class_sample")


def distributed(module: str) -> Any:
    """A module of :mod:`ltloss.distributed`, on first use: a single process never imports it."""
    return importlib.import_module(f"ltloss.distributed.{module}")


def _not_served(features: Tensor, prototypes: Tensor) -> str:
    """Why the kernels cannot take these tensors; empty where they can."""
    if not _HAS_TRITON:
        return "Triton is not installed"
    if features.dtype not in _KERNEL_DTYPES or prototypes.dtype not in _KERNEL_DTYPES:
        return f"the kernels take half precision and float32, not {features.dtype} with {prototypes.dtype}"
    if features.shape[1] > _WIDEST_KERNEL:
        return f"the kernels take up to {_WIDEST_KERNEL} columns, not {features.shape[1]}"
    if features.device.type == "cuda" and torch.cuda.get_device_properties(features.device).major < 8:
        return "the kernels need a GPU of compute capability 8.0 or higher"
    return ""


def kernels_chosen(features: Tensor, prototypes: Tensor) -> bool:
    """Whether the kernels are to run on these tensors; raises where they were asked for and cannot."""
    backend = current_backend()
    if backend == "triton":
        reason = _not_served(features, prototypes)
        if reason:
            raise RuntimeError(f"backend 'triton' was asked for, but {reason}; use 'auto' or 'torch'")
        return True
    return backend == "auto" and features.device.type == "cuda" and not _not_served(features, prototypes)


def _kernel(name: str, module: str = "triton_backend") -> Callable[..., Any]:
    # On first use: `import ltloss` works and is fast without Triton.
    return getattr(importlib.import_module(f"ltloss.{module}"), name)  # type: ignore[no-any-return]


def _implementation(name: str, args: Sequence[Any]) -> Callable[..., Any]:
    """The one place that decides what runs: the kernels where they serve the tensors, chunked PyTorch otherwise."""
    if name in _FUSED:
        return _kernel(name)
    if name in _KERNELS:
        module, (left, right) = _KERNELS[name]
        return _kernel(name, module) if kernels_chosen(args[left], args[right]) else _CHUNKED[name]
    return _CHUNKED[name]


def _define(schema: str, fake: Callable[..., Any]) -> Any:
    """Register an operator whose implementation is looked up at each call; return the callable operator."""
    name = schema.partition("(")[0]
    torch.library.define(f"ltloss::{name}", schema.removeprefix(name), tags=torch.Tag.pt2_compliant_tag)

    def dispatch(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if not torch.is_autocast_enabled(device.type):
            return _implementation(name, args)(*args)
        with torch.autocast(device.type, enabled=False):  # else the products inside would drop to half precision
            return _implementation(name, args)(*args)

    torch.library.impl(f"ltloss::{name}", "default", dispatch)
    torch.library.register_fake(f"ltloss::{name}", fake)
    return getattr(torch.ops.ltloss, name).default


def _fake_cosine_logsumexp(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    scale: float,
    normalize_features: bool,
    with_logit_sum: bool,
) -> tuple[Tensor, ...]:
    dtype = cpu.compute_dtype(features, prototypes)
    n, c = features.shape[0], prototypes.shape[0]
    lengths = (n, n, n if with_logit_sum else 0, n if normalize_features else 0, c)
    return tuple(features.new_empty(length, dtype=dtype) for length in lengths)


def _fake_cosine_logsumexp_backward(*args: Any) -> tuple[Tensor, Tensor]:
    features, prototypes, needs = args[3], args[4], args[-1]
    return (
        features.new_empty(features.shape) if needs[0] else features.new_empty(0),
        prototypes.new_empty(prototypes.shape) if needs[1] else prototypes.new_empty(0),
    )


def _fake_fused(*args: Any) -> tuple[Tensor, ...]:
    features, prototypes, normalize_features, reduction = args[0], args[1], args[14], args[17]
    n, scalar = features.shape[0], features.new_empty((), dtype=torch.float32)
    return (
        scalar.new_empty(n if reduction == "none" else ()),
        scalar.new_empty(4 if normalize_features else 5, n),
        scalar.new_empty(prototypes.shape[0]),
        scalar.new_empty(()),
        scalar.new_empty(()),
    )


def _fake_fused_backward(*args: Any) -> tuple[Tensor, Tensor]:
    features, prototypes, needs = args[1], args[2], args[-1]
    return (
        features.new_empty(features.shape) if needs[0] else features.new_empty(0),
        prototypes.new_empty(prototypes.shape) if needs[1] else prototypes.new_empty(0),
    )


def _fake_nearest_prototype(prototypes: Tensor, rows: Tensor | None, exact: bool) -> tuple[Tensor, Tensor]:
    length = prototypes.shape[0] if rows is None else rows.shape[0]
    dtype = cpu.compute_dtype(prototypes)
    return prototypes.new_empty(length, dtype=dtype), prototypes.new_empty(length, dtype=torch.int64)


def _fake_nearest_prototype_backward(
    grad_cosine: Tensor, prototypes: Tensor, rows: Tensor | None, index: Tensor
) -> Tensor:
    return prototypes.new_empty(prototypes.shape)


def _fake_top_k(features: Tensor, prototypes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (features.shape[0], k)
    dtype = cpu.compute_dtype(features, prototypes)
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

fused_margin_cross_entropy = _define(
    "fused_margin_cross_entropy(Tensor features, Tensor prototypes, Tensor labels, Tensor? log_prior, "
    "Tensor? angular_margins, Tensor? cosine_margins, Tensor? class_weights, float angular_margin, "
    "float cosine_margin, float class_weight, float scale, float angle_multiplier, float label_smoothing, "
    "int ignore_index, bool normalize_features, str beyond_pi, str margin_gradient, str reduction) -> (Tensor loss, "
    "Tensor coefficients, Tensor class_factor, Tensor inverse_total, Tensor bound)",
    _fake_fused,
)
"""The whole of :func:`ltloss.functional.margin_cross_entropy` in a handful of launches; kernels only.

Vectors are (C,), and the number of the same name counts where there is none. Outputs: loss, a scalar or (N,);
coefficients (4, N), or (5, N) where features keep their length: what the backward needs of each sample;
s·log2 e/‖w‖ (C,), for the backward; 1/Σ weights for ``mean``, else 1, and the largest coefficient, two scalars.
"""

fused_margin_cross_entropy_backward = _define(
    "fused_margin_cross_entropy_backward(Tensor grad_loss, Tensor features, Tensor prototypes, Tensor labels, "
    "Tensor? log_prior, Tensor coefficients, Tensor class_factor, Tensor inverse_total, Tensor bound, "
    "float scale, bool smooth, int ignore_index, bool normalize_features, bool[] needs) -> (Tensor, Tensor)",
    _fake_fused_backward,
)
"""Gradients for features (N, D) and prototypes (C, D), each in its input's dtype; (0,) where ``needs`` is False."""

nearest_prototype = _define(
    "nearest_prototype(Tensor prototypes, Tensor? rows, bool exact) -> (Tensor cosine, Tensor index)",
    _fake_nearest_prototype,
)
"""For every prototype, or for those in ``rows`` (R,), the largest cosine to any other one and its (lowest) index.

``exact``: products in full float32, even where ``torch.set_float32_matmul_precision`` allows less.
"""

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
