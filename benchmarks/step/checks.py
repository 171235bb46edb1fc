"""Checks before anything is timed: loss and gradients against float64, then the movement of the prototypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.peers import ON_CPU, Inputs, Shape, check_step, exact_step
from benchmarks.step.cases import SETTINGS, Case, Training

SMALL = Shape(32, 300, 16)
STEPS = 20
# Ours and torch's both round an entry once a step, by 2^-25 of it on average. If all twenty roundings add up, that is
# 6e-7 of an entry of 0.25, which moves by 20·1e-3 (AdamW): 7e-6 of its movement. Most roundings cancel. A learning rate
# that is off by 1e-4 would give 1e-4.
WAY_OFF = 7e-6
# With stochastic rounding, the prototypes move as far along torch's direction as torch's do, on average over the 4800
# entries. State is off by some 2^-9 of itself, so the mean is off by 2^-9·√(20/4800), 1e-4. Prototypes are off by a few
# 2^-10 in each of 20 steps, which is much if the steps are small: the mean is off by up to 3 % at the rates below.
# Rounding to nearest, which loses whatever is smaller than half a unit, falls short by 45 % and more.
STATE_OFF, PROTOTYPES_OFF = 1e-3, 0.1
SLOW = {"AdamW": 0.3, "SGD": 0.001, "SGD, decay": 0.001, "Adagrad": 0.03}  # fractions of the family's learning rate


class _RowwiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one number per class, on the stored gradient, in float64; torch has no such optimizer."""

    def __init__(self, parameters: list[Tensor], lr: float, eps: float = 1e-10) -> None:
        super().__init__(parameters, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        (weight,) = group["params"]
        gradient, state = weight.grad.double(), self.state[weight]
        state["sum"] = state.get("sum", 0.0) + gradient.square().mean(1, keepdim=True)
        weight.copy_(weight.double() - group["lr"] * gradient / (state["sum"].sqrt() + group["eps"]))


def check_loss(case: Case) -> float:
    """Relative error of loss and stored gradients against the dense formula in float64; raises if it is too large."""
    provider = next(provider for provider in ON_CPU if provider.name == case.provider)
    inputs = Inputs.draw(SMALL)
    return check_step(case.name, provider.build(inputs), inputs, exact_step(provider.truth, inputs))


def _batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        features = torch.randn(SMALL.n, SMALL.d, generator=generator)
        yield features, torch.randint(SMALL.c, (SMALL.n,), generator=generator)


@torch.no_grad()
def _way(training: Training) -> tuple[Tensor, Tensor]:
    """The initial prototypes and their movement over all batches, in float64."""
    start = training.prototypes()
    for features, labels in _batches():
        training.inputs.features.copy_(features)
        training.inputs.labels = labels
        with torch.enable_grad():
            training.step()
    return start, training.prototypes() - start


def _truth(case: Case, start: Tensor, rate: float) -> Tensor:
    """The movement of the same prototypes by torch's optimizer, in float32, on the stored gradient of the same loss."""
    today = Training(Case(f"torch {case.family}", case.family, options=(("lr", rate),)), SMALL)
    with torch.no_grad():
        today.inputs.prototypes.copy_(start)
    if case.family == "Adagrad":
        today.optimizer = _RowwiseAdagrad([today.inputs.prototypes], rate)
    return _way(today)[1]


def check_way(case: Case) -> float:
    """The error of the prototypes after 20 steps, relative to their movement; raises if rounding does not explain it.

    A case that samples classes is checked with all classes. Prototypes below float32 are checked with a small rate.
    """
    narrow = case.dtype != torch.float32
    rate = SETTINGS[case.family]["lr"] * (SLOW[case.family] if narrow else 1.0)
    rate *= 16.0 if case.dtype == torch.float8_e4m3fn else 1.0  # its spacing is 16 times that of bfloat16
    case = dataclasses.replace(case, sample_rate=1.0, options=(("lr", rate), *case.options))
    start, way = _way(Training(case, SMALL))
    truth = _truth(case, start, rate)
    if case.is_rounded:
        error = abs(float((way * truth).sum() / truth.square().sum()) - 1.0)
        limit = PROTOTYPES_OFF if narrow else STATE_OFF
    else:
        error, limit = float((way - truth).norm() / truth.norm()), WAY_OFF
    if not error < limit:
        raise RuntimeError(f"{case.name}: off by {error:.1e} of the way after {STEPS} steps, above {limit}; not timed")
    return error


def check(case: Case) -> float:
    """The larger error of :func:`check_loss` and :func:`check_way`; torch's own optimizers need only the first."""
    error = check_loss(case)
    torch_own = case.optimizer is None and not case.options
    return error if torch_own else max(error, check_way(case))
