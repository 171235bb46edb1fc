"""Launches that repeat: the compiled kernel of a launch is kept, and the next equal launch calls it directly.

Triton looks at every argument of a launch, makes a key of types, alignments and some values, and looks up the kernel
that was compiled for that key. In a training step the key is the same each time, and on a small head the look-up takes
longer than the kernel: see "Host time" in ``docs/performance-kernels.md``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import triton
from torch import Tensor

__all__ = ["Launch", "Launches", "forget", "layout", "through_triton"]

_MOST_KEYS = 512  # batches of ever new sizes must not fill the memory

Launch = Callable[..., Any]
_kept: dict[Hashable, dict[int, tuple[Any, Launch]]] = {}  # key -> number of the launch -> the kernel and its launch


def through_triton(kernel: Any, grid: tuple[int, ...]) -> Launch:
    """``kernel[grid]``: for launches that are rare, or that cost the device more than the host."""
    launch: Launch = kernel[grid]
    return launch


def layout(*tensors: Tensor | None) -> tuple[Any, ...]:
    """All that Triton can specialise a kernel for: dtype, shape, strides, alignment and device of each tensor."""
    return tuple(
        None if one is None else (one.dtype, one.shape, one.stride(), one.data_ptr() % 16, one.device)
        for one in tensors
    )


def forget() -> None:
    """Drop every kept launch."""
    _kept.clear()


_UNKNOWN: tuple[Any, Launch] = (None, through_triton)


class Launches:
    """The launches of one call of an entry point, in their order.

    ``key`` must determine all of them but for the addresses of tensors and the values of floats. It holds the
    :func:`layout` of the caller's tensors, and every number and choice from which grids, sizes and constants follow.
    Memory that the entry point allocates itself has the same alignment each time.
    """

    def __init__(self, *key: Hashable) -> None:
        if len(_kept) >= _MOST_KEYS:
            _kept.clear()
        self._launches = _kept.setdefault(key, {})
        self._count = 0

    def __call__(self, kernel: Any, grid: tuple[int, ...]) -> Launch:
        """``kernel[grid]``, through the kept kernel if there is one; pass constants by name."""
        number, self._count = self._count, self._count + 1
        known, launch = self._launches.get(number, _UNKNOWN)
        if known is kernel:
            return launch
        if not isinstance(kernel, triton.JITFunction):  # interpreted
            return through_triton(kernel, grid)
        return functools.partial(self._first, number, kernel, grid)

    def _first(self, number: int, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        compiled = kernel[grid](*args, **constants)
        if isinstance(compiled, triton.compiler.CompiledKernel):
            launch = compiled[(*grid, 1, 1)[:3]]
            values = tuple(constants[name] for name in kernel.arg_names[len(args) :])
            self._launches[number] = kernel, lambda *args, **_: launch(*args, *values)
