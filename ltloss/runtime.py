"""Which implementation runs, how much memory it may take, whether labels on a GPU are checked: all our switches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Literal, get_args

from ltloss._deprecation import warn_deprecated
from ltloss.errors import VariableError

__all__ = [
    "Backend",
    "current_backend",
    "current_debug",
    "current_keep_exponentials",
    "current_workspace",
    "debug_labels",
    "set_debug",
    "use_backend",
    "use_workspace",
]

Backend = Literal["auto", "triton", "torch", "reference"]


def _checked(name: str, origin: str, error: type[ValueError] = ValueError) -> Backend:
    for known in get_args(Backend):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise error(f"{origin} must be one of {', '.join(get_args(Backend))}; got {name!r}")


_VARIABLE = "the environment variable LTLOSS_"
_backend: Backend = _checked(os.environ.get("LTLOSS_BACKEND", "auto"), f"{_VARIABLE}BACKEND", VariableError)


def current_backend() -> Backend:
    """The backend in force (see :class:`use_backend`).

    Example:
        >>> import ltloss
        >>> ltloss.current_backend()
        'auto'
    """
    return _backend


class use_backend(AbstractContextManager["use_backend"]):
    """Force one implementation, from now on or inside a ``with`` block.

    Args:
        name: ``"auto"`` takes the kernels for tensors on a GPU that they serve (half precision and float32, compute
            capability 8.0 on, Triton installed), and chunked PyTorch otherwise; ``"torch"`` chunked PyTorch everywhere;
            ``"reference"`` the dense one of :mod:`ltloss.reference` (needs N×C memory);
            ``"triton"`` the GPU kernels, and raises where they cannot run.

    The environment variable ``LTLOSS_BACKEND`` sets the initial value. The switch is global to the process.

    Example:
        >>> import ltloss
        >>> with ltloss.use_backend("reference"):
        ...     ltloss.current_backend()
        'reference'
        >>> ltloss.current_backend()
        'auto'
    """

    def __init__(self, name: Backend) -> None:
        global _backend
        self._previous = _backend
        _backend = _checked(name, "backend")

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _backend
        _backend = self._previous


def _checked_bytes(given: int, origin: str, error: type[ValueError] = ValueError) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or given <= 0:
        raise error(f"{origin} must be a positive integer; got {given!r}")
    return given


def _workspace_of_environment() -> int:
    given = os.environ.get("LTLOSS_WORKSPACE_MIB", "256")
    mib = int(given) if given.isdecimal() else 0
    return _checked_bytes(mib, f"{_VARIABLE}WORKSPACE_MIB", VariableError) << 20


_workspace: int = _workspace_of_environment()
_keep_exponentials = False


def current_workspace() -> int:
    """How many bytes a step may take beside the gradients (see :class:`use_workspace`).

    Example:
        >>> import ltloss
        >>> ltloss.current_workspace() >> 20
        256
    """
    return _workspace


def current_keep_exponentials() -> bool:
    """Whether exponentials are kept for the backward (see :class:`use_workspace`).

    Example:
        >>> import ltloss
        >>> ltloss.current_keep_exponentials()
        False
    """
    return _keep_exponentials


class use_workspace(AbstractContextManager["use_workspace"]):
    """Limit the memory of the kernels' backward, or spend memory on time. From now on, or inside a ``with`` block.

    Args:
        limit: bytes beside the gradients. A batch whose float32 gradient alone takes more is still computed, in the
            smallest slabs.
        keep_exponentials: keep exp(logit) of every sample and class from the forward to the backward, in bfloat16:
            2·N·C bytes on a rank of N rows and C classes. The backward reads them instead of multiplying for the
            logits again: a step takes 3 products of N·C·D instead of 4. The loss keeps its bits. The gradient of every
            logit but the target's is rounded, to 2^-8 of itself. Nothing is kept, and gradients keep their bits, where
            it does not fit into ``limit``, and in float64. What is kept and the backward's slabs, which the kernels
            hold beside it, are each within ``limit``. When it pays: docs/performance.md.

    The environment variable ``LTLOSS_WORKSPACE_MIB`` sets the initial limit, 256 without it. Global to the process.

    Example:
        >>> import ltloss
        >>> with ltloss.use_workspace(64 << 20):
        ...     ltloss.current_workspace() >> 20
        64
        >>> with ltloss.use_workspace(64 << 20, keep_exponentials=True):  # 256 samples, 100 000 classes: 49 MiB
        ...     ltloss.current_keep_exponentials()
        True
    """

    def __init__(self, limit: int, *, keep_exponentials: bool = False) -> None:
        global _workspace, _keep_exponentials
        self._previous = _workspace, _keep_exponentials
        limit = _checked_bytes(limit, "limit")
        _workspace, _keep_exponentials = limit, bool(keep_exponentials)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _workspace, _keep_exponentials
        _workspace, _keep_exponentials = self._previous


_debug = os.environ.get("LTLOSS_DEBUG", "0") not in ("", "0")


def current_debug() -> bool:
    """Whether labels on a GPU are checked (see :func:`set_debug`).

    Example:
        >>> import ltloss
        >>> with ltloss.debug_labels():
        ...     ltloss.current_debug()
        True
    """
    return _debug


def set_debug(on: bool) -> None:
    """Check labels on a GPU too from now on, at the price of one host synchronisation a call, or no longer.

    Labels on the CPU are always checked. The environment variable ``LTLOSS_DEBUG=1`` turns it on at import. Global to
    the process. :func:`debug_labels` limits it to a block.

    Args:
        on: whether to check them.

    Example:
        >>> import ltloss
        >>> ltloss.set_debug(False)
        >>> ltloss.current_debug()
        False
    """
    global _debug
    _debug = bool(on)


@contextmanager
def debug_labels(on: bool = True) -> Iterator[None]:
    """``set_debug(on)`` inside a ``with`` block, and what was before after it.

    Args:
        on: whether to check labels on a GPU.

    Example:
        >>> import ltloss
        >>> with ltloss.debug_labels():  # IndexError for a bad label, on a GPU as well
        ...     pass
    """
    previous = _debug
    set_debug(on)
    try:
        yield
    finally:
        set_debug(previous)


class _Debug:
    """``ltloss.debug`` of version 0.1: a switch, a context manager and a flag."""

    def __call__(self, on: bool = True) -> ExitStack:
        warn_deprecated(
            "ltloss.debug is ltloss.set_debug now, and ltloss.debug_labels for a block; it ends with version 0.3"
        )
        scope = ExitStack()
        scope.callback(set_debug, _debug)
        set_debug(on)
        return scope

    def __bool__(self) -> bool:
        warn_deprecated("bool(ltloss.debug) is ltloss.current_debug() now; it ends with version 0.3")
        return _debug


debug = _Debug()
