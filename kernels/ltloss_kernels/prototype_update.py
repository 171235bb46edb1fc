"""Arguments with which the last kernels of a backward update the prototypes instead of writing their gradient."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ltloss_kernels.config.operands import part
from ltloss_kernels.device.prototype_update import update_numbers_kernel
from ltloss_kernels.launching import Launches, layout

__all__ = ["NO_UPDATE", "PrototypeUpdate", "Updating"]

_NUMBERS = 16  # entries of the vector that update_numbers_kernel writes


class PrototypeUpdate(NamedTuple):
    """One step of an optimizer, as tensors and numbers. All tensors are contiguous.

    Attributes:
        rule: the formula, see ``ltloss_kernels.device.prototype_update``.
        settings: numbers of the rule: (μ, dampening, λ) for "sgd" and "nesterov", (1 - β1, 1 - β2, ε, λ) for "adamw",
            (ε, λ) for "adagrad".
        lr: η; a tensor on the device is read when the kernels run, also on replay of a CUDA graph.
        weight: (C, D) float32, bfloat16 or float8: the prototypes, updated in place.
        state: none to two tensors, (C, D) each, or (C,) for "adagrad"; float32 or bfloat16. For "adamw" the averages
            of the gradients, then those of their squares.
        compensation: (C, D) bfloat16, what the rounding of the weight cut off; None without it.
        rounding: "stochastic" or "nearest", for everything in bfloat16 or float8; "kahan" with a compensation, where
            the state is rounded stochastically.
        seed: of the stochastic rounding, which also depends on the number of the step.
        first_class: the number that ``weight[0]`` has among the classes of all shards.
        finite: bool scalar on the device; if False, the step writes nothing but ``skipped``.
        step, skipped: float32 and int64 scalars on the device: how many steps were done, and skipped. The kernels
            count this one.
        max_class_norm: the longest that the gradient of a class may be, or None.
        loss_scale: float32 scalar on the device that the gradients are divided by, or None.
        exponent: (C,) int8 for a float8 weight, else None: prototype c is 2^exponent_c · weight_c.
    """

    rule: Literal["sgd", "nesterov", "adamw", "adagrad"]
    settings: tuple[float, ...]
    lr: float | Tensor
    weight: Tensor
    state: tuple[Tensor, ...]
    compensation: Tensor | None
    rounding: Literal["stochastic", "nearest", "kahan"]
    seed: int
    first_class: int
    finite: Tensor
    step: Tensor
    skipped: Tensor
    max_class_norm: float | None = None
    loss_scale: Tensor | None = None
    exponent: Tensor | None = None

    @property
    def needs_rows(self) -> bool:
        """Whether the update needs whole rows of the gradient: for Adagrad, clipping by class, and float8."""
        return self.rule == "adagrad" or self.max_class_norm is not None or self.exponent is not None

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that decides which kernels are launched, see :class:`ltloss_kernels.launching.Launches`."""
        lr = self.lr if isinstance(self.lr, Tensor) else None
        kept = self.weight, self.exponent, *self.state, self.compensation
        tensors = lr, *kept, self.finite, self.step, self.skipped, self.loss_scale
        return self.rule, self.rounding, self.seed, self.first_class, self.max_class_norm is None, layout(*tensors)


class Updating:
    """Arguments that the launches of one backward take for the update; None or empty without an update."""

    def __init__(self, update: PrototypeUpdate | None) -> None:
        self.update, self.numbers = update, None
        self.constants: dict[str, Any] = {"RULE": "", "ROUNDING": "", "CLIP": False}
        if update is not None:
            self.numbers = torch.empty(_NUMBERS, dtype=torch.float32, device=update.weight.device)
            clip = update.max_class_norm is not None
            self.constants = {"RULE": update.rule, "ROUNDING": update.rounding, "CLIP": clip}

    def launch_numbers(self, launch: Launches) -> None:
        """Write the numbers of this step on the device, and count it."""
        update = self.update
        if update is None:
            return
        on_device = isinstance(update.lr, Tensor)
        launch(update_numbers_kernel, (1,))(
            # inputs
            update.finite,
            update.loss_scale,
            update.lr if on_device else None,
            # outputs
            self.numbers,
            # updated
            update.step,
            update.skipped,
            # sizes
            float(update.max_class_norm or 0.0),
            0.0 if on_device else float(update.lr),
            *(float(one) for one in (*update.settings, 0.0, 0.0, 0.0, 0.0)[:4]),
            # constants
            RULE=update.rule,
        )

    def states(self, first: int, count: int) -> tuple[Tensor | None, ...]:
        """Two states and the compensation of ``count`` classes from ``first`` on."""
        if self.update is None:
            return None, None, None
        here = slice(first, first + count)
        state = (*self.update.state, None, None)[:2]
        return tuple(part(one, here) for one in (*state, self.update.compensation))

    def exponents(self, first: int, count: int) -> Tensor | None:
        """Exponents of ``count`` classes from ``first`` on; None unless the weight is float8."""
        return None if self.update is None else part(self.update.exponent, slice(first, first + count))

    def place(self, first: int) -> tuple[int, int]:
        """The seed, and the number of a slab's first class among the classes of all shards."""
        return (0, 0) if self.update is None else (self.update.seed, self.update.first_class + first)


NO_UPDATE = Updating(None)
