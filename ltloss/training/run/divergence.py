"""Detect that a training has diverged, and say so."""

from __future__ import annotations

from torch import Tensor

from ltloss.errors import DivergedError


def check_finite(losses: Tensor, epoch: int, steps: int, lr: float) -> None:
    """Raise DivergedError if one of an epoch's losses so far is NaN or infinite; it names the step, of ``steps``."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step = int(bad[0]) + 1
        raise diverged(f"the loss is {losses[step - 1].item()} at step {step} of {steps} in epoch {epoch}", lr)


def diverged(what: str, lr: float) -> DivergedError:
    """The error with what happened, the learning rate, and advice."""
    return DivergedError(
        f"{what} (learning rate {lr:.3g})",
        "start a new --out with a lower --lr, or with a smaller --scale where it is extreme. Earlier checkpoints are "
        "untouched",
    )
