"""Registration of operators, and the choice of the backend.

An operator has one schema and one implementation per backend. Each implementation is registered with PyTorch under a
name of its own (``ltloss::top_k_torch``, ``ltloss::top_k_triton``). The backward therefore runs the backend that the
forward chose, and ``torch.compile`` can trace both.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ltloss.errors import BackendError
from ltloss.float8 import FLOAT8
from ltloss.runtime import current_backend

__all__ = [
    "IMPLEMENTATIONS",
    "Chosen",
    "Kernel",
    "at_hand",
    "choose_backend",
    "define",
    "distributed",
    "is_sharded",
    "no_gradient",
]

Chosen = Literal["torch", "triton", "reference"]

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FLOAT8_FROM = (8, 9)  # compute capability from which Triton converts it
_WIDEST_KERNEL = 8192


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None  # looked up, not imported
    except (ImportError, ValueError):
        return False


_HAS_TRITON = _has_triton()


def _not_served(features: Tensor, prototypes: Tensor) -> str:
    """The reason why the kernels cannot take these tensors; empty if they can."""
    if not _HAS_TRITON:
        return "Triton is not installed"
    # Prototypes are searched among prototypes; features in float8 are refused before.
    if prototypes.dtype not in (*_KERNEL_DTYPES, FLOAT8) or features.dtype not in (*_KERNEL_DTYPES, prototypes.dtype):
        return (
            "the kernels take float16, bfloat16 and float32, and float8_e4m3fn for prototypes, not "
            f"{features.dtype} with {prototypes.dtype}"
        )
    if features.shape[1] > _WIDEST_KERNEL:
        return f"the kernels take up to {_WIDEST_KERNEL} columns, not {features.shape[1]}"
    if features.device.type == "cuda":
        properties = torch.cuda.get_device_properties(features.device)
        if properties.major < 8:
            return "the kernels need a GPU of compute capability 8.0 or higher"
        if prototypes.dtype == FLOAT8 and (properties.major, properties.minor) < _FLOAT8_FROM:
            return "the kernels need a GPU of compute capability 8.9 or higher for float8 prototypes"
    return ""


def _not_runnable(device: torch.device) -> str:
    """The reason why the kernels cannot run on this device; empty if they can, and while compiling."""
    if device.type == "cuda" or torch.compiler.is_compiling():
        return ""
    running = importlib.import_module("ltloss_kernels.running")
    return "" if running.runnable(device) else f"the tensors are on {device}, and {running.RUNNABLE}"


def choose_backend(features: Tensor, prototypes: Tensor, *, sharded: bool = False, updated: bool = False) -> Chosen:
    """Choose the backend for these tensors: the kernels where they can run, chunked PyTorch otherwise.

    Raises:
        BackendError: the backend of :class:`ltloss.use_backend` cannot handle them.
        TypeError: float8 prototypes would need a gradient.
    """
    if prototypes.dtype == FLOAT8 and prototypes.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            "prototypes in float8 cannot hold a gradient; give the loss module to an optimizer of ltloss.optim, or "
            "compute under torch.no_grad()"
        )
    backend = current_backend()
    if backend == "reference":
        if sharded:
            raise BackendError(
                "backend 'reference' holds all classes in one piece; these prototypes are spread over ranks or "
                "sampled. Use 'auto', 'torch' or 'triton'"
            )
        if updated:
            raise BackendError(
                "backend 'reference' leaves gradients to autograd and cannot update prototypes inside the backward. "
                "Use 'auto', 'torch' or 'triton', or an optimizer of torch.optim"
            )
        return "reference"
    if backend == "triton":
        reason = _not_served(features, prototypes) or _not_runnable(features.device)
        if reason:
            raise BackendError(f"backend 'triton' was requested, but {reason}; use 'auto' or 'torch'")
        return "triton"
    kernels = backend == "auto" and features.device.type == "cuda" and not _not_served(features, prototypes)
    return "triton" if kernels else "torch"


def is_sharded(prototypes: Tensor) -> bool:
    """Whether the classes are spread over ranks, so that :mod:`ltloss.distributed` must search them."""
    return hasattr(prototypes, "device_mesh")


def at_hand(prototypes: Tensor, shard: Any = None) -> tuple[Tensor, Any]:
    """Return the prototypes that this rank multiplies and their ``Shard``: the given one, a DTensor's, or None."""
    if shard is None and is_sharded(prototypes):
        shard = distributed("logsumexp").ClassShard.of(prototypes)
    return (prototypes, None) if shard is None else (shard.take(prototypes), shard)


def distributed(module: str) -> Any:
    """A module of :mod:`ltloss.distributed`, on first use: a single process never imports it."""
    return importlib.import_module(f"ltloss.distributed.{module}")


class Kernel(NamedTuple):
    """A function of ``ltloss_kernels``, imported when it is first called: ``import ltloss`` needs no Triton."""

    name: str
    options: Mapping[str, Any] = MappingProxyType({})  # that no schema lists

    def imported(self) -> Callable[..., Any]:
        """The function itself."""
        return functools.partial(getattr(importlib.import_module("ltloss_kernels"), self.name), **self.options)


def define(schema: str, fake: Callable[..., Any], **implementations: Callable[..., Any] | Kernel) -> Mapping[str, Any]:
    """Register an operator with one implementation per backend; return the callable operators by backend."""
    name, _, signature = schema.partition("(")
    return {
        backend: _register(f"{name}_{backend}", f"({signature}", fake, work)
        for backend, work in implementations.items()
    }


# "ltloss", or what another copy of this package is imported as (kernels/hub): two of them then stand side by side.
_NAMESPACE = __name__.removesuffix(".ops._dispatch").replace(".", "_")
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}  # by operator; what hides behind it from a TorchDispatchMode


def _register(name: str, signature: str, fake: Callable[..., Any], implementation: Callable[..., Any] | Kernel) -> Any:
    _LIBRARY.define(f"{name}{signature}", tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    operator = getattr(getattr(torch.ops, _NAMESPACE), name).default

    def implement(work: Callable[..., Any]) -> Callable[..., Any]:
        IMPLEMENTATIONS[operator] = work
        _LIBRARY.impl(name, work, "CompositeExplicitAutograd", allow_override=True)  # type: ignore[no-untyped-call]
        return work

    def first_call(*args: Any) -> Any:  # of a kernel; later ones go to it directly
        assert isinstance(implementation, Kernel)
        with warnings.catch_warnings():  # PyTorch says that this very function is replaced
            warnings.simplefilter("ignore", UserWarning)
            work = implement(implementation.imported())
        return work(*args)

    def without_autocast(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.autocast(device, enabled=False):  # else the products inside would drop to half precision
            return operator(*args)

    implement(first_call if isinstance(implementation, Kernel) else implementation)
    for device in ("CPU", "CUDA", "XPU", "MPS"):
        _LIBRARY.impl(name, without_autocast, f"Autocast{device}")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return operator


def no_gradient(operators: Mapping[str, Any]) -> None:
    """Make an attempt to differentiate these operators raise a clear error."""
    for operator in operators.values():
        torch.library.register_autograd(operator, functools.partial(_refuse, operator.name()))


def _refuse(name: str, ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        f"{name} cannot be differentiated (again); use ltloss.use_backend('reference') for higher derivatives"
    )
