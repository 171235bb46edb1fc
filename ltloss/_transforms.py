"""Adapter that lets our autograd Functions run under the transforms of ``torch.func``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["apply_of", "transforming"]

_ELSEWHERE = "use ltloss.use_backend('reference'), which is plain PyTorch (dense)"


def transforming() -> bool:
    """Whether a transform of ``torch.func`` is active; False while compiling."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def apply_of(function: Any) -> Callable[..., Any]:
    """Return ``function.apply``, or under ``torch.func`` a form of it that ``grad``, ``vjp`` and ``jacrev`` accept.

    The transforms need a ``setup_context``, and all tensors of the backward among the outputs. With a
    ``setup_context`` PyTorch inspects the signature of ``forward`` in every call, so the usual call does without. A
    Function whose backward is not made of PyTorch's own operations sets ``once``: a second derivative then raises,
    where it would silently be 0.
    """
    apply: Callable[..., Any] = functools.partial(_transformed, function) if transforming() else function.apply
    return apply


def _transformed(function: Any, *given: Any) -> Any:
    *results, count, _ = _transformable(function).apply(*given)
    return tuple(results[:count]) if count > 1 else results[0]


class _Notes:
    """A stand-in for the ``ctx`` of a forward that records what the forward saves and sets."""

    def __init__(self, inputs: int) -> None:
        self.needs_input_grad = (False,) * inputs  # so that the forward keeps only what every backward needs
        self.saved: tuple[Tensor | None, ...] = ()
        self.fixed: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.fixed = tensors


@functools.cache
def _transformable(function: Any) -> Any:
    """Make a Function that also returns the saved tensors of ``function``, the number of results, and the notes."""

    class Transformable(torch.autograd.Function):
        @staticmethod
        def forward(*given: Any) -> Any:
            notes = _Notes(len(given))
            found = function.forward(notes, *given)
            results = found if isinstance(found, tuple) else (found,)
            made = [one for one in notes.saved if one is not None and _place(one, (*given, *results)) is None]
            places = [None if one is None else _place(one, (*given, *results, *made)) for one in notes.saved]
            fixed = [_place(one, results) for one in notes.fixed]
            options = {name: value for name, value in vars(notes).items() if name not in vars(_Notes(0))}
            return (*results, *made, len(results), (options, places, fixed))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            *tensors, ctx.count, (options, places, fixed) = output
            known = (*inputs, *tensors)
            ctx.save_for_backward(*(None if place is None else known[place] for place in places))
            ctx.mark_non_differentiable(*(tensors[place] for place in fixed), *tensors[ctx.count :])
            vars(ctx).update(options)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            grads = grads[: ctx.count]
            if not getattr(function, "once", False):
                return function.backward(ctx, *grads)
            with torch.no_grad():
                found = function.backward(ctx, *grads)
            return _Final.apply(function.__name__, len(found), *found, *grads, *ctx.saved_tensors)  # type: ignore[no-untyped-call]

        @staticmethod
        def vmap(*_: Any) -> Any:
            raise RuntimeError(f"{function.__name__} does not support torch.func.vmap; {_ELSEWHERE}")

        @staticmethod
        def jvp(*_: Any) -> Any:
            raise RuntimeError(
                f"{function.__name__} does not support forward-mode derivatives (jvp, jacfwd, hessian); {_ELSEWHERE}"
            )

    return Transformable


def _place(tensor: Tensor, among: tuple[Any, ...]) -> int | None:
    return next((place for place, one in enumerate(among) if one is tensor), None)


class _Final(torch.autograd.Function):
    """Passes gradients through unchanged, and raises if they are differentiated again."""

    @staticmethod
    def forward(name: str, count: int, *tensors: Any) -> Any:
        return tuple(one.view_as(one) if isinstance(one, Tensor) else one for one in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{ctx.name} cannot be differentiated again; {_ELSEWHERE}")

    @staticmethod
    def vmap(info: Any, in_dims: Any, name: str, count: int, *tensors: Any) -> Any:
        return _Final.apply(name, count, *tensors), in_dims[2 : 2 + count]  # type: ignore[no-untyped-call]
