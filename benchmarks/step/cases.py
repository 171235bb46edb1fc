"""The cases that are measured, by name: a loss and an optimizer, from ``zero_grad`` to ``step``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.peers import ON_CPU, SCALE, Inputs, Shape
from ltloss import CombinedMarginLoss
from ltloss.distributed import SampledAdamW, SampledSGD, parallelize
from ltloss.float8 import decoded
from ltloss.optim import PrototypeAdagrad, PrototypeAdamW, PrototypeSGD

# Equal for every optimizer of a family. The decay of the second SGD is that of face recognition (ArcFace, PFC).
SETTINGS: dict[str, dict[str, float]] = {
    "AdamW": {"lr": 1e-3, "weight_decay": 1e-2},
    "SGD": {"lr": 1.0, "momentum": 0.9},
    "SGD, decay": {"lr": 1.0, "momentum": 0.9, "weight_decay": 5e-4},
    "Adagrad": {"lr": 1e-2},
}
TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
    "SGD, decay": torch.optim.SGD,
    "Adagrad": torch.optim.Adagrad,
}
SAMPLE_RATE = 0.1


class Goal(NamedTuple):
    """The most time and memory that a step may take, as ratios to the loss with torch's optimizer of the family."""

    time: float | None
    memory: float


@dataclass(frozen=True)
class Case:
    """A loss with an optimizer. ``optimizer`` takes a loss module of ours; None is torch's, which takes prototypes."""

    name: str
    family: str
    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    options: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.float32
    provider: str = "ltloss"
    sample_rate: float = 1.0
    goal: Goal | None = None

    @property
    def is_today(self) -> bool:
        """Whether it is what the others of its family are compared with: our loss and torch's plain optimizer."""
        return self.provider == "ltloss" and self.optimizer is None and not self.options

    @property
    def is_rounded(self) -> bool:
        """Whether prototypes or state have fewer bits than float32, so that they equal float32 only on average."""
        return {self.dtype, dict(self.options).get("state_dtype", self.dtype)} != {torch.float32}


_STATE: tuple[tuple[str, Any], ...] = (("state_dtype", torch.bfloat16),)
_ALL: dict[str, Any] = {"dtype": torch.bfloat16, "options": (*_STATE, ("rounding", "stochastic"))}
_FLOAT8: dict[str, Any] = {**_ALL, "dtype": torch.float8_e4m3fn}


def _family(family: str, ours: Callable[..., torch.optim.Optimizer], goal: Goal, narrow_state: Goal) -> list[Case]:
    name = f"Prototype{family}"
    return [
        Case(f"torch {family}", family),
        Case(f"torch {family}, fused", family, options=(("fused", True),)),
        Case(name, family, ours, goal=goal),
        Case(f"{name}, bfloat16 state", family, ours, _STATE, goal=narrow_state),
        Case(f"{name}, bfloat16", family, ours, goal=Goal(None, 0.35), **_ALL),
    ]


def _peers() -> list[Case]:
    names = [provider.name for provider in ON_CPU if provider.name != "ltloss" and not provider.compiled]
    return [Case(f"{name} + torch AdamW", "AdamW", provider=name) for name in names]


CASES = {
    case.name: case
    for case in (
        *_family("AdamW", PrototypeAdamW, Goal(0.70, 0.60), Goal(0.70, 0.45)),
        *_family("SGD", PrototypeSGD, Goal(0.85, 0.65), Goal(0.85, 0.65)),
        *_family("SGD, decay", PrototypeSGD, Goal(0.85, 0.65), Goal(0.85, 0.65)),
        Case("torch Adagrad", "Adagrad"),
        Case("PrototypeAdagrad", "Adagrad", PrototypeAdagrad),
        Case("PrototypeAdagrad, bfloat16", "Adagrad", PrototypeAdagrad, **_ALL),
        Case("PrototypeAdagrad, float8", "Adagrad", PrototypeAdagrad, **_FLOAT8),
        Case("PrototypeAdamW, float8", "AdamW", PrototypeAdamW, **_FLOAT8),
        Case("Partial FC 0.1, SampledAdamW", "AdamW", SampledAdamW, sample_rate=SAMPLE_RATE),
        Case("Partial FC 0.1, PrototypeAdamW", "AdamW", PrototypeAdamW, sample_rate=SAMPLE_RATE),
        Case("Partial FC 0.1, SampledSGD", "SGD", SampledSGD, sample_rate=SAMPLE_RATE),
        *_peers(),
    )
}


class Training:
    """The training of a case on one batch; ``step()`` returns the loss."""

    def __init__(self, case: Case, shape: Shape, seed: int = 0) -> None:
        self.inputs, self.loss, module = _ours(case, shape, seed) if case.provider == "ltloss" else _peer(case, shape)
        self.exponent: Tensor | None = None if module is None else module.weight_exponent
        settings = {**SETTINGS[case.family], **dict(case.options)}
        if case.optimizer is None:
            self.optimizer = TORCH[case.family]([self.inputs.prototypes], **settings)
        else:
            self.optimizer = case.optimizer(module, **settings)

    def prototypes(self) -> Tensor:
        """The prototypes (C, D) as they are now, in float64."""
        kept = self.inputs.prototypes.detach()
        return (kept if self.exponent is None else decoded(kept, self.exponent)).double()

    def step(self) -> Tensor:
        """Do a whole step: clear the gradients, forward, backward, update the prototypes."""
        self.optimizer.zero_grad()
        self.inputs.features.grad = None
        loss = self.loss()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return loss.detach()


def _ours(case: Case, shape: Shape, seed: int) -> tuple[Inputs, Callable[[], Tensor], Any]:
    """The inputs, loss and module of a case of ours. The module makes its prototypes, whose memory then counts too."""
    torch.manual_seed(seed)
    inputs = Inputs.draw(Shape(shape.n, 1, shape.d), seed)
    inputs.labels = torch.randint(shape.c, (shape.n,))
    margins = 0.5 * (1 + 1000 * torch.rand(shape.c) ** 4) ** -0.25
    module = CombinedMarginLoss(shape.c, shape.d, scale=SCALE, angular_margin=margins, dtype=case.dtype)
    module = parallelize(module, None, sample_rate=case.sample_rate)
    inputs.prototypes, inputs.margins = module.weight, margins
    return inputs, lambda: module(inputs.features, inputs.labels), module


def _peer(case: Case, shape: Shape) -> tuple[Inputs, Callable[[], Tensor], None]:
    inputs = Inputs.draw(shape)
    provider = next(provider for provider in ON_CPU if provider.name == case.provider)
    return inputs, provider.build(inputs), None
