"""Which implementation runs, how much memory it may take, whether labels on a GPU are checked: all our switches."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Literal, get_args

from ltloss.errors import VariableError

__all__ = ["Backend", "current_backend", "current_workspace", "debug", "use_backend", "use_workspace"]

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


def current_workspace() -> int:
    """How many bytes the backward of the kernels may take beside the gradients (see :class:`use_workspace`).

    Example:
        >>> import ltloss
        >>> ltloss.current_workspace() >> 20
        256
    """
    return _workspace


class use_workspace(AbstractContextManager["use_workspace"]):
    """Limit the memory of the kernels' backward, from now on or inside a ``with`` block.

    Args:
        limit: bytes beside the gradients. A batch whose float32 gradient alone takes more is still computed, in the
            smallest slabs.

    The environment variable ``LTLOSS_WORKSPACE_MIB`` sets the initial value, 256 without it. Global to the process.

    Example:
        >>> import ltloss
        >>> with ltloss.use_workspace(64 << 20):
        ...     ltloss.current_workspace() >> 20
        64
    """

    def __init__(self, limit: int) -> None:
        global _workspace
        self._previous = _workspace
        _workspace = _checked_bytes(limit, "limit")

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _workspace
        _workspace = self._previous


class _Debug:
    """``ltloss.debug(True)`` checks labels on a GPU too, at the price of one host synchronisation a call.

    Labels on the CPU are always checked. ``with ltloss.debug(): ...`` limits it to a block, ``bool(ltloss.debug)`` is
    the state, and the environment variable ``LTLOSS_DEBUG=1`` turns it on at import.
    """

    def __init__(self) -> None:
        self.on = os.environ.get("LTLOSS_DEBUG", "0") not in ("", "0")

    def __call__(self, on: bool = True) -> _DebugScope:
        scope = _DebugScope(self.on)
        self.on = on
        return scope

    def __bool__(self) -> bool:
        return self.on


class _DebugScope(AbstractContextManager["_DebugScope"]):
    def __init__(self, previous: bool) -> None:
        self._previous = previous

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        debug.on = self._previous


debug = _Debug()
