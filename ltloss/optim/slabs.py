"""The update of some rows of prototypes at a time, and how they are written back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ltloss.float8 import FLOAT8, converted, power_of_two, scaled_down
from ltloss.numerics import compute_dtype, spans
from ltloss.ops.protocols import Shard
from ltloss.optim.rounding import random_bits, round_stochastically

__all__ = ["Moving", "Slabs"]

# Elements of the float32 copies that an update works on: a CPU's own cache holds them, and the allocator keeps them.
_COPIED = 1 << 17


class Moving(NamedTuple):
    """What a step moves: the classes at hand, their state, and how both are kept."""

    weight: Tensor
    exponent: Tensor | None  # of float8 prototypes
    state: dict[str, Tensor]  # in the order of their random streams
    compensation: Tensor | None  # what Kahan's rounding of the weight cut off
    step: Tensor
    rounding: Literal["stochastic", "kahan", "nearest"]  # of whatever is not wide
    seed: int
    first_class: int  # the number of the first class at hand among all
    max_class_norm: float | None


class Slabs:
    """One backward: takes the gradients of the classes a slab at a time.

    Args:
        moving: what moves; its step is counted here.
        move: moves some prototypes (rows, D) by their gradient, and their state, all wide, in place.
        inverse_scale: what undoes the scale of the gradients, or None.
        shard: which classes the gradients belong to; None for all.
        joined: (C, D) gradient to add, or None.
    """

    def __init__(
        self,
        moving: Moving,
        move: Callable[[Tensor, Tensor, dict[str, Tensor], Tensor], None],
        inverse_scale: float | None,
        shard: Shard | None,
        joined: Tensor | None,
    ) -> None:
        self.moving, self.move, self.inverse_scale = moving, move, inverse_scale
        self.shard, self.joined = shard, joined
        moving.step.add_(1)
        weight = moving.weight
        self.wide = compute_dtype(weight)
        in_place = {weight.dtype, *(tensor.dtype for tensor in moving.state.values())} == {self.wide}
        self.index: Tensor | None = None if shard is None else shard.index
        self.rows = max(1, weight.shape[0])
        if weight.device.type == "cpu" and not (in_place and self.index is None):
            self.rows = max(1, _COPIED // weight.shape[1])

    @torch.no_grad()
    def take(self, start: int, stop: int, gradient: Tensor) -> None:
        """The gradient (stop - start, D) of these classes, or of these of the sample. It is used up."""
        if self.shard is not None:
            gradient = self.shard.reduce_prototypes(gradient)
        gradient = gradient.to(self.wide)  # float64 features make it that
        for first, last in spans(stop - start, self.rows):
            self._move(slice(start + first, start + last), gradient[first:last])

    def _move(self, part: slice, gradient: Tensor) -> None:
        here = part if self.index is None else self.index[part]
        kept = {"": self.moving.weight, **self.moving.state}
        wide = {name: converted(tensor[here], self.wide) for name, tensor in kept.items()}  # a view if it is wide
        if self.moving.exponent is not None:  # the loss saw the prototypes without their exponents
            factor = power_of_two(self.moving.exponent[here])[:, None]
            gradient /= factor
            wide[""] *= factor
        if self.joined is not None:
            gradient += self.joined[here]
        if self.inverse_scale is not None:
            gradient *= self.inverse_scale
        if self.moving.max_class_norm is not None:
            norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient *= (self.moving.max_class_norm / norm).clamp_max_(1.0)
        if self.moving.compensation is not None:
            wide[""] += self.moving.compensation[here]
        weight = wide.pop("")
        self.move(weight, gradient, wide, self.moving.step)
        for stream, (name, rows) in enumerate({"": weight, **wide}.items()):
            self._keep(kept[name], here, rows, stream)

    def _keep(self, kept: Tensor, here: Tensor | slice, rows: Tensor, stream: int) -> None:
        """Write rows back to where they are kept; ``stream`` 0 are the prototypes, the others their state."""
        if kept.dtype == FLOAT8 and self.moving.exponent is not None:
            self.moving.exponent[here], rows = scaled_down(rows)
        if kept.dtype not in (torch.bfloat16, FLOAT8) or self.moving.rounding == "nearest":
            if isinstance(here, Tensor) or rows.dtype != kept.dtype:
                kept[here] = rows.to(kept.dtype)
        elif self.moving.compensation is not None and stream == 0:
            kept[here] = rounded = rows.to(torch.bfloat16)
            self.moving.compensation[here] = rows.sub_(rounded).to(torch.bfloat16)
        else:
            width = rows[0].numel()
            bits = random_bits(self._classes(here), width, self.moving.seed, int(self.moving.step), stream)
            rounded = rows.new_empty(rows.shape, dtype=kept.dtype) if isinstance(here, Tensor) else kept[here]
            round_stochastically(rows, bits.to(rows.device).reshape(rows.shape), rounded)
            if isinstance(here, Tensor):
                kept[here] = rounded

    def _classes(self, here: Tensor | slice) -> range | np.ndarray:
        """Global numbers of some rows."""
        first = self.moving.first_class
        if isinstance(here, slice):
            return range(first + here.start, first + here.stop)
        numbers: np.ndarray = here.cpu().numpy() + first
        return numbers
