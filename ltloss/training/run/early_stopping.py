"""When a training ends before its last epoch, and which epoch is kept: decided on the validation part alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def best_epoch(history: Sequence[Mapping[str, Any]]) -> int:
    """The epoch (from 1) of the highest balanced accuracy on the validation part, the first of several; 0 before any.

    The balanced one, because the part is as long-tailed as the training images, and the test is about every class.
    """
    return 1 + first_best([row["validation_balanced_accuracy"] for row in history])


def first_best(found: Sequence[float]) -> int:
    """The place of the highest of some numbers, the first of several; -1 of none."""
    return max(range(len(found)), key=found.__getitem__, default=-1)


def is_over(history: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether the last ``patience`` epochs brought nothing better; None: they never end a training."""
    return patience is not None and len(history) - best_epoch(history) >= patience
