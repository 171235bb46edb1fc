"""Triton's interpreter: without a search that it repeats, and closer to a GPU's arithmetic."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Within the block the members of Triton's language are listed once, not for every call of a device function.

    That search took a quarter of the time of a kernel's test.
    """
    from triton.language import core
    from triton.runtime import interpreter

    @functools.cache
    def builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins(package):
            member = getattr(package, name)
            if core.is_builtin(member):  # not within another call, which has replaced it
                interpreter._patch_attr(package, name, member, builder, scope)

    with mock.patch.object(interpreter, "_patch_builtin", patch_builtin):
        yield


@contextmanager
def nearest_bfloat16() -> Iterator[None]:
    """Within the block the interpreter rounds float32 to the nearest bfloat16, as a GPU does; it would cut bits off."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    usual = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if (source.dtype.scalar, kind.scalar) != (float32, bfloat16):
            return usual(self, source, kind)
        rounded = torch.tensor(source.data, dtype=torch.float32).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), kind.scalar)

    with mock.patch.object(InterpreterBuilder, "cast_impl", cast_impl):
        yield


@contextmanager
def products_by_value() -> Iterator[None]:
    """Within the block equal rows and columns have equal products, wherever in a tile they stand, as on a GPU.

    The interpreter multiplies by a BLAS, whose order of sums differs with the place; here in float64, rounded once.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, left: Any, right: Any, start: Any, *precision: Any) -> Any:
        product = np.matmul(left.data.astype(np.float64), right.data.astype(np.float64)) + start.data
        return TensorHandle(product.astype(start.data.dtype), start.dtype.scalar)

    with mock.patch.object(InterpreterBuilder, "create_dot", create_dot):
        yield
