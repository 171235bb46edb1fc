"""Embeddings with a long tail, and a classifier of them that is fitted in a fraction of a second."""

from __future__ import annotations

from typing import Any

import numpy as np

from ltloss.sklearn import LongTailClassifier

ATTRIBUTES = ("prototypes_", "intercept_", "mean_", "whitening_", "class_counts_", "temperature_", "n_iter_", "loss_")


def tail(seed: int = 0, width: int = 8, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Six classes of 200 samples down to 6 around centres that stay, in float32."""
    centres = np.random.default_rng(99).normal(size=(6, width)) * 1.5
    y = np.repeat(np.arange(6), (200, 100, 50, 25, 12, 6))
    draw = np.random.default_rng(seed)
    return (centres[y] + spread * draw.normal(size=(len(y), width))).astype(np.float32), y


def quick(**options: Any) -> LongTailClassifier:
    return LongTailClassifier(**{"loss": "linear", "max_iter": 8, "batch_size": 64, "random_state": 0, **options})


def same(one: LongTailClassifier, other: LongTailClassifier) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ATTRIBUTES)
