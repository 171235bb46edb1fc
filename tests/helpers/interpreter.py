"""Triton's interpreter: without a search that it repeats, and closer to a GPU's arithmetic."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Within the block the interpreter leaves out what it repeats, which is more than half of the time of a test.

    It lists the members of Triton's language for every call of a device function, to patch them once more; it builds a
    table for every dtype that it looks up, the shape of every tensor anew, and the name of every block type; it
    compares shapes and dtypes that are the same object; and it computes all integers a second time in 64 bits, to look
    for an overflow that the small problems of tests cannot have.
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
                scope.set_attr(package, name, interpreted(member))

    @functools.cache
    def interpreted(member: Any) -> Any:
        function = inspect.unwrap(member)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **kwargs)

        return call

    @functools.cache
    def languages(function: Any) -> frozenset[Any]:
        return frozenset(one for one in (interpreter.tl, core) if any(one is g for g in function.__globals__.values()))

    usual, patched = interpreter._patch_lang, set[Any]()

    def patch_language(function: Any) -> Any:
        new = languages(function) - patched
        if not new:  # a device function, within its kernel
            return interpreter._LangPatchScope()
        scope = usual(function)
        patched.update(new)
        restore = scope.restore

        def restored() -> None:
            restore()
            patched.difference_update(new)

        scope.restore = restored
        return scope

    of_any = interpreter._get_np_dtype
    of_scalar = functools.cache(of_any)

    def of_kind(kind: Any) -> Any:
        return of_any(kind) if kind.scalar.is_ptr() else of_scalar(kind.scalar)

    builder = interpreter.interpreter_builder
    with (
        mock.patch.object(interpreter, "_patch_builtin", patch_builtin),
        mock.patch.object(interpreter, "_patch_lang", patch_language),
        _types_kept(),
        mock.patch.object(interpreter, "_get_np_dtype", of_kind),
        mock.patch.object(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False)),
    ):
        yield


@contextmanager
def _types_kept() -> Iterator[None]:
    """Within the block shapes and block types are made once: one object, which compares fast."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    @functools.cache
    def shape_of(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def new_tensor(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = shape_of(tuple(kind.shape) if kind.is_block() else ())

    new_block_type, blocks, shapes = core.block_type.__init__, dict[Any, Any](), dict[Any, Any]()

    def block_type(self: Any, element: Any, shape: Any) -> None:
        sizes = tuple(getattr(size, "value", size) for size in shape)
        kept = blocks.get((element.name, sizes))
        if kept is None:
            new_block_type(self, element, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            blocks[element.name, sizes] = kept = {k: v for k, v in vars(self).items() if k != "element_ty"}
        vars(self).update(kept, element_ty=element)

    broadcast_unequal = TritonSemantic.broadcast_impl_value

    def broadcast(self: Any, left: Any, right: Any) -> Any:
        if left.type.is_block() and right.type.is_block() and left.type.shape is right.type.shape:
            return left, right
        return broadcast_unequal(self, left, right)

    equal_dtypes = core.dtype.__eq__

    def equal(self: Any, other: Any) -> bool:
        return self is other or equal_dtypes(self, other)

    with (
        mock.patch.object(core.tensor, "__init__", new_tensor),
        mock.patch.object(core.block_type, "__init__", block_type),
        mock.patch.object(core.dtype, "__eq__", equal),
        mock.patch.object(TritonSemantic, "broadcast_impl_value", broadcast),
    ):
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


@contextmanager
def opaque_launches(seen: Callable[[str], None] = lambda kernel: None) -> Iterator[None]:
    """Within the block no TorchDispatchMode sees what the interpreter does; ``seen`` gets each kernel's name."""
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime.interpreter import GridExecutor

    execute = GridExecutor.__call__

    def launch(self: Any, *args: Any, **options: Any) -> Any:
        seen(self.fn.__name__)
        with _disable_current_modes():
            return execute(self, *args, **options)

    with mock.patch.object(GridExecutor, "__call__", launch):
        yield
