"""When a training has diverged, and what it says then."""

from __future__ import annotations

from torch import Tensor

from ltloss.errors import DivergedError


def check_finite(losses: Tensor, epoch: int, steps: int, lr: float) -> None:
    """DivergedError where one of the losses of an epoch so far is NaN or infinite; names its step of ``steps``."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step = int(bad[0]) + 1
        raise diverged(f"the loss is {losses[step - 1].item()} at step {step} of {steps} in epoch {epoch}", lr)


def diverged(what: str, lr: float) -> DivergedError:
    """The error that says what happened, at which learning rate, and what to do."""
    return DivergedError(
        f"{what} (learning rate {lr:.3g})",
        "start a new --out with a lower --lr, or with a smaller --scale where it is extreme. Earlier checkpoints are "
        "untouched",
    )
