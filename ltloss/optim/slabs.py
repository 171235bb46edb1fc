"""The update of some rows of prototypes at a time, and how they are written back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ltloss.distributed.layout import Layout, local
from ltloss.numerics import spans
from ltloss.optim.rounding import random_bits, round_stochastically

if TYPE_CHECKING:
    from ltloss.optim.prototype_optimizer import PrototypeOptimizer

__all__ = ["Slabs"]

# Elements of the float32 copies that an update works on: a CPU's own cache holds them, and the allocator keeps them.
_COPIED = 1 << 17


class Slabs:
    """One backward: takes the gradients of the classes a slab at a time."""

    def __init__(self, optimizer: PrototypeOptimizer, shard: Any, joined: Tensor | None) -> None:
        (group,), weight = optimizer.param_groups, optimizer.weight
        state = {name: local(tensor) for name, tensor in optimizer.state[weight].items()}
        self.optimizer, self.shard, self.joined = optimizer, shard, joined
        self.weight, self.step = local(weight), state.pop("step")
        self.compensation, self.state = state.pop("compensation", None), state
        self.step += 1
        self.first = Layout.of(weight).span()[0]
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        self.rounding = optimizer.rounding or "stochastic"  # of bfloat16 state beside float32 prototypes
        self.seed, self.max_class_norm = group["seed"], group["max_class_norm"]
        self.inverse_scale = optimizer.inverse_scale()
        in_place = {self.weight.dtype, *(tensor.dtype for tensor in state.values())} == {self.wide}
        self.index = None if shard is None else shard.index
        self.rows = max(1, self.weight.shape[0])
        if self.weight.device.type == "cpu" and not (in_place and self.index is None):
            self.rows = max(1, _COPIED // self.weight.shape[1])

    @torch.no_grad()
    def take(self, start: int, stop: int, gradient: Tensor) -> None:
        """The gradient (stop - start, D) of these classes, or of these of the sample. It is used up."""
        if self.shard is not None:
            gradient = self.shard.reduce_prototypes(gradient)
        for first, last in spans(stop - start, self.rows):
            self._move(slice(start + first, start + last), gradient[first:last])

    def _move(self, part: slice, gradient: Tensor) -> None:
        here = part if self.index is None else self.index[part]
        if self.joined is not None:
            gradient += self.joined[here]
        if self.inverse_scale is not None:
            gradient *= self.inverse_scale
        if self.max_class_norm is not None:
            norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient *= (self.max_class_norm / norm).clamp_max_(1.0)
        kept = {"": self.weight, **self.state}
        wide = {name: tensor[here].to(self.wide) for name, tensor in kept.items()}  # a slab of its own dtype is a view
        if self.compensation is not None:
            wide[""] += self.compensation[here]
        weight = wide.pop("")
        self.optimizer.move(weight, gradient, wide, self.step)
        for stream, (name, rows) in enumerate({"": weight, **wide}.items()):
            self._keep(kept[name], here, rows, stream)

    def _keep(self, kept: Tensor, here: Tensor | slice, rows: Tensor, stream: int) -> None:
        """Write rows back to where they are kept; ``stream`` 0 are the prototypes, the others their state."""
        if kept.dtype != torch.bfloat16 or self.rounding == "nearest":
            if isinstance(here, Tensor) or rows.dtype != kept.dtype:
                kept[here] = rows.to(kept.dtype)
        elif self.compensation is not None and stream == 0:
            kept[here] = rounded = rows.to(torch.bfloat16)
            self.compensation[here] = rows.sub_(rounded).to(torch.bfloat16)
        else:
            width = rows[0].numel()
            bits = random_bits(self._classes(here), width, self.seed, int(self.step), stream)
            rounded = rows.new_empty(rows.shape, dtype=torch.bfloat16) if isinstance(here, Tensor) else kept[here]
            round_stochastically(rows, bits.to(rows.device).reshape(rows.shape), rounded)
            if isinstance(here, Tensor):
                kept[here] = rounded

    def _classes(self, here: Tensor | slice) -> range | np.ndarray:
        """Global numbers of some rows."""
        if isinstance(here, slice):
            return range(self.first + here.start, self.first + here.stop)
        numbers: np.ndarray = here.cpu().numpy() + self.first
        return numbers
