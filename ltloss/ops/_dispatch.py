"""How an operator is made, and which backend runs it: nothing else in the package knows the backends.

An operator has one schema and one implementation per backend, each registered with PyTorch under its own name
(``ltloss::top_k_torch``, ``ltloss::top_k_triton``), so that the backend that was chosen in the forward is the one whose
gradient runs in the backward, and ``torch.compile`` sees through both.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ltloss.errors import BackendError
from ltloss.runtime import current_backend

__all__ = ["Chosen", "at_hand", "choose_backend", "define", "distributed", "is_sharded", "lazy", "no_gradient"]

Chosen = Literal["torch", "triton", "reference"]

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WIDEST_KERNEL = 8192


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None  # looked up, not imported
    except (ImportError, ValueError):
        return False


_HAS_TRITON = _has_triton()


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


def choose_backend(features: Tensor, prototypes: Tensor, *, sharded: bool = False) -> Chosen:
    """The backend for these tensors: the kernels where they serve them, chunked PyTorch otherwise.

    Raises:
        BackendError: a backend was asked for (:class:`ltloss.use_backend`) that cannot serve them.
    """
    backend = current_backend()
    if backend == "reference":
        if sharded:
            raise BackendError(
                "backend 'reference' holds all classes in one piece; these prototypes are spread over ranks or "
                "sampled. Use 'auto', 'torch' or 'triton'"
            )
        return "reference"
    if backend == "triton":
        reason = _not_served(features, prototypes)
        if reason:
            raise BackendError(f"backend 'triton' was asked for, but {reason}; use 'auto' or 'torch'")
        return "triton"
    kernels = backend == "auto" and features.device.type == "cuda" and not _not_served(features, prototypes)
    return "triton" if kernels else "torch"


def is_sharded(prototypes: Tensor) -> bool:
    """Whether the classes are spread over ranks: then :mod:`ltloss.distributed` searches among them."""
    return hasattr(prototypes, "device_mesh")


def at_hand(prototypes: Tensor, labels: Tensor) -> tuple[Tensor, Any]:
    """The prototypes and None; or, where classes are spread over ranks or sampled, this rank's and their ``Shard``."""
    if not (is_sharded(prototypes) or hasattr(prototypes, "class_sample")):
        return prototypes, None
    found: tuple[Tensor, Any] = distributed("logsumexp").shard_of(prototypes, labels)
    return found


def distributed(module: str) -> Any:
    """A module of :mod:`ltloss.distributed`, on first use: a single process never imports it."""
    return importlib.import_module(f"ltloss.distributed.{module}")


def lazy(name: str) -> Callable[..., Any]:
    """A function of :mod:`ltloss.ops._triton`, imported when it is called: ``import ltloss`` needs no Triton."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module("ltloss.ops._triton"), name)(*args)

    return call


def define(schema: str, fake: Callable[..., Any], **implementations: Callable[..., Any]) -> Mapping[str, Any]:
    """Register an operator with one implementation per backend; return the callable operators by backend."""
    name, _, signature = schema.partition("(")
    return {
        backend: _register(f"{name}_{backend}", f"({signature}", fake, work)
        for backend, work in implementations.items()
    }


def run(implementation: Callable[..., Any], *args: Any) -> Any:
    """Every operator's work passes here; tests look into it."""
    return implementation(*args)


def _register(name: str, signature: str, fake: Callable[..., Any], implementation: Callable[..., Any]) -> Any:
    torch.library.define(f"ltloss::{name}", signature, tags=torch.Tag.pt2_compliant_tag)

    @functools.wraps(implementation)
    def without_autocast(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if not torch.is_autocast_enabled(device.type):
            return run(implementation, *args)
        with torch.autocast(device.type, enabled=False):  # else the products inside would drop to half precision
            return run(implementation, *args)

    torch.library.impl(f"ltloss::{name}", "default", without_autocast)
    torch.library.register_fake(f"ltloss::{name}", fake)
    return getattr(torch.ops.ltloss, name).default


def no_gradient(operators: Mapping[str, Any]) -> None:
    """Let an attempt to differentiate these operators end in words."""
    for operator in operators.values():
        torch.library.register_autograd(operator, functools.partial(_refuse, operator.name()))


def _refuse(name: str, ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        f"{name} cannot be differentiated (again); use ltloss.use_backend('reference') for higher derivatives"
    )
