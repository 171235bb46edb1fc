"""Detect that a training has diverged, and say so."""

from __future__ import annotations

import torch
from torch import Tensor

from ltloss.errors import DivergedError
from ltloss.float8 import FLOAT8

_TOO_LARGE = 2.0**64  # of which the square is beyond float32


def check_finite(losses: Tensor, epoch: int, steps: int, lr: float) -> None:
    """Raise DivergedError if one of an epoch's losses so far is NaN or infinite; it names the step, of ``steps``."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step = int(bad[0]) + 1
        raise diverged(f"the loss is {losses[step - 1].item()} at step {step} of {steps} in epoch {epoch}", lr)


def all_usable(weights: Tensor) -> Tensor:
    """Whether no weight is NaN or so large that its square overflows: a tensor without dimensions, on their device."""
    if weights.dtype == FLOAT8:  # whose NaN are all ones, but for the sign; others are small
        return (weights.view(torch.uint8) | 128 != 255).all()
    if not weights.numel():  # a rank may have no class
        return torch.ones((), dtype=torch.bool, device=weights.device)
    return (torch.stack(weights.aminmax()).float().abs() < _TOO_LARGE).all()


def diverged(what: str, lr: float) -> DivergedError:
    """The error with what happened, the learning rate, and advice."""
    return DivergedError(
        f"{what} (learning rate {lr:.3g})",
        "start a new --out with a lower --lr, or with a smaller --scale where it is extreme. Earlier checkpoints are "
        "untouched",
    )
