"""When a training ends early, and which epoch is used: both are decided by the validation part alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def best_epoch(history: Sequence[Mapping[str, Any]]) -> int:
    """The first epoch (from 1) with the highest balanced accuracy on the validation part; 0 before the first epoch.

    It is the balanced accuracy, because the part is as long-tailed as the training images, and every class matters.
    """
    return 1 + first_best([row["validation_balanced_accuracy"] for row in history])


def first_best(found: Sequence[float]) -> int:
    """The index of the first highest number; -1 if there are none."""
    return max(range(len(found)), key=found.__getitem__, default=-1)


def is_over(history: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether the last ``patience`` epochs were no better than an earlier one; always False for None."""
    return patience is not None and len(history) - best_epoch(history) >= patience
