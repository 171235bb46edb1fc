"""Schedules of a training: the learning rate, and the epoch from which class weights apply."""

from __future__ import annotations

import math

from ltloss.training.run.settings import Settings, schedule_steps


def first_epoch(when: float, epochs: int) -> int:
    """The epoch (from 0) that ``when`` stands for: ``when`` itself, or below 1 that fraction of ``epochs``."""
    return round(when * epochs) if when < 1 else round(when)


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """The learning rate of step number ``step`` (from 0) of ``total``.

    It rises linearly to settings.lr during the warm-up. Then it falls along half a cosine to 0, or is multiplied by the
    factors of settings.schedule, each from its epoch on.
    """
    rising = math.floor(settings.warmup * total)
    if step < rising:
        return settings.lr * (step + 1) / rising
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))
    factor = 1.0
    for when, value in schedule_steps(settings.schedule):
        if step >= first_epoch(when, settings.epochs) * total // settings.epochs:
            factor = value
    return settings.lr * factor
