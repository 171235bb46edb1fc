"""Images and settings of runs that take a fraction of a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np

CLASS_NAMES = ("apple", "bean", "corn")


def toy_images(per_class: int, seed: int = 0, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Three classes that are easy to tell apart: the bright third of a noisy image, top, middle or bottom."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), per_class)
    images = generator.integers(0, 60, (len(labels), size, size))
    for image, label in zip(images, labels, strict=True):
        image[label * size // 3 : (label + 1) * size // 3] += 180
    return images.astype(np.uint8), labels


def toy_settings(data: Path | str, **changes: object) -> dict[str, object]:
    """Settings of a run that takes a fraction of a second."""
    return {"data": str(data), "epochs": 2, "batch_size": 16, "embedding_size": 8, "device": "cpu", **changes}
