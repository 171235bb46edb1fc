"""The switches of this package: which backend runs, how much memory it may use, whether labels on a GPU are checked."""

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
    """Return the name of the backend in force.

    See also: :class:`use_backend`, which sets it.

    Example:
        >>> import ltloss
        >>> ltloss.current_backend()
        'auto'
    """
    return _backend


class use_backend(AbstractContextManager["use_backend"]):
    """Choose the backend, from now on or inside a ``with`` block.

    Args:
        name: ``"auto"`` runs the Triton kernels where they can (float16, bfloat16 or float32 tensors on a GPU of
            compute capability 8.0 or newer, Triton installed) and chunked PyTorch elsewhere. ``"torch"`` runs chunked
            PyTorch everywhere. ``"reference"`` runs the dense :mod:`ltloss.reference`, which needs N×C memory.
            ``"triton"`` runs the kernels, and raises BackendError where they cannot run.

    The environment variable ``LTLOSS_BACKEND`` sets the initial value. The switch applies to the whole process.

    Raises:
        ValueError: an unknown name.

    See also: :func:`current_backend`; :class:`use_workspace`, which limits the memory.

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


def _checked_bool(name: str, given: bool) -> bool:
    if not isinstance(given, bool):  # "no" would be true
        raise TypeError(f"{name} must be True or False (bool); got {type(given).__name__} {given!r}")
    return given


def _workspace_of_environment() -> int:
    given = os.environ.get("LTLOSS_WORKSPACE_MIB", "256")
    mib = int(given) if given.isdecimal() else 0
    return _checked_bytes(mib, f"{_VARIABLE}WORKSPACE_MIB", VariableError) << 20


_workspace: int = _workspace_of_environment()
_keep_exponentials = False


def current_workspace() -> int:
    """Return the limit of the workspace, in bytes.

    See also: :class:`use_workspace`, which sets it.

    Example:
        >>> import ltloss
        >>> ltloss.current_workspace() >> 20
        256
    """
    return _workspace


def current_keep_exponentials() -> bool:
    """Return whether exponentials are kept for the backward.

    See also: :class:`use_workspace`, which sets it.

    Example:
        >>> import ltloss
        >>> ltloss.current_keep_exponentials()
        False
    """
    return _keep_exponentials


class use_workspace(AbstractContextManager["use_workspace"]):
    """Limit the workspace of the backward, or trade memory for time. From now on, or inside a ``with`` block.

    Args:
        limit: bytes that the kernels' backward may use in addition to the gradients. If the float32 gradient of a
            batch alone exceeds it, the batch is still computed, in the smallest slabs.
        keep_exponentials: keep exp(logit) of every sample and class from the forward to the backward, in bfloat16:
            2·N·C bytes on a rank with N rows and C classes. The backward then does not recompute the logits: a step
            takes 3 products of N·C·D instead of 4. The loss is bitwise the same. The gradient of every logit except
            the target's is rounded, relative error 2^-8. Nothing is kept, and nothing is rounded, where the
            exponentials exceed ``limit`` or in float64. The exponentials and the slabs of the kernels' backward each
            stay within ``limit``. docs/performance.md says when it pays.

    The environment variable ``LTLOSS_WORKSPACE_MIB`` sets the initial limit in MiB; the default is 256. The switch
    applies to the whole process.

    Raises:
        ValueError: a limit that is not a positive integer.

    See also: :func:`current_workspace`, :func:`current_keep_exponentials`; :class:`use_backend`.

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
        _workspace, _keep_exponentials = limit, _checked_bool("keep_exponentials", keep_exponentials)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _workspace, _keep_exponentials
        _workspace, _keep_exponentials = self._previous


_debug = os.environ.get("LTLOSS_DEBUG", "0") not in ("", "0")


def current_debug() -> bool:
    """Return whether labels on a GPU are checked.

    See also: :func:`set_debug` and :func:`debug_labels`, which set it.

    Example:
        >>> import ltloss
        >>> with ltloss.debug_labels():
        ...     ltloss.current_debug()
        True
    """
    return _debug


def set_debug(on: bool) -> None:
    """Turn the check of labels on a GPU on or off. It costs one host synchronisation per call.

    Labels on the CPU are always checked. The environment variable ``LTLOSS_DEBUG=1`` turns the check on at import. The
    switch applies to the whole process.

    Args:
        on: whether to check them.

    See also: :func:`debug_labels`, for a ``with`` block; :func:`current_debug`.

    Example:
        >>> import ltloss
        >>> ltloss.set_debug(False)
        >>> ltloss.current_debug()
        False
    """
    global _debug
    _debug = _checked_bool("on", on)


@contextmanager
def debug_labels(on: bool = True) -> Iterator[None]:
    """Set the check of labels on a GPU inside a ``with`` block, and restore it afterwards.

    Args:
        on: whether to check them.

    Returns:
        A context manager.

    See also: :func:`set_debug`, for the whole process.

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
    """``ltloss.debug`` of version 0.1: a function, a context manager and a flag in one."""

    def __call__(self, on: bool = True) -> ExitStack:
        warn_deprecated(
            "ltloss.debug is deprecated and goes with version 0.3; use ltloss.set_debug, or ltloss.debug_labels for a "
            "block"
        )
        scope = ExitStack()
        scope.callback(set_debug, _debug)
        set_debug(on)
        return scope

    def __bool__(self) -> bool:
        warn_deprecated("bool(ltloss.debug) is deprecated and goes with version 0.3; use ltloss.current_debug()")
        return _debug


debug = _Debug()
