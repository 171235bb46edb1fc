"""What changes from epoch to epoch: the learning rate, and when class weights set in."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ltloss.training.run.settings import Settings


def valid_schedule(text: str) -> bool:
    """Whether ``text`` is ``cosine`` or steps as WHEN:FACTOR,... in rising order."""
    if text == "cosine":
        return True
    try:
        pairs = _pairs(text)
    except ValueError:
        return False
    rising = [when for when, _ in pairs] == sorted({when for when, _ in pairs})
    return rising and all(0 < value < math.inf for pair in pairs for value in pair)


def _pairs(text: str) -> list[tuple[float, float]]:
    parts = [part.partition(":") for part in text.split(",")]
    return [(float(when), float(factor)) for when, _, factor in parts]


def first_epoch(when: float, epochs: int) -> int:
    """The epoch (from 0) that ``when`` means: itself, or below 1 that fraction of ``epochs``."""
    return round(when * epochs) if when < 1 else round(when)


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """The rate of step number ``step`` (from 0) of ``total``: a linear rise to settings.lr, then half a cosine to 0, or
    the factors of settings.schedule from their epochs on.
    """
    rising = math.floor(settings.warmup * total)
    if step < rising:
        return settings.lr * (step + 1) / rising
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))
    factor = 1.0
    for when, value in _pairs(settings.schedule):
        if step >= first_epoch(when, settings.epochs) * total // settings.epochs:
            factor = value
    return settings.lr * factor
