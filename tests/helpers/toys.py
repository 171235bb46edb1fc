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


def write_images(path: Path, train: int = 20, test: int = 5) -> Path:
    """A FILE.npz of toy images, so many a class in each split."""
    (x_train, y_train), (x_test, y_test) = toy_images(train), toy_images(test, seed=1)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, class_names=np.array(CLASS_NAMES))
    return path


def toy_settings(data: Path | str, **changes: object) -> dict[str, object]:
    """Settings of a run that takes a fraction of a second."""
    return {"data": str(data), "epochs": 2, "batch_size": 16, "embedding_size": 8, "device": "cpu", **changes}


def toy_embeddings(per_class: int, seed: int = 0, width: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Float32 around three centres, of features that go together and differ in spread by a factor of a hundred."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), per_class)
    centres = 3 * np.random.default_rng(99).normal(size=(3, width))
    mixed = np.random.default_rng(98).normal(size=(width, width)) * np.logspace(-1, 1, width)
    rows = (centres[labels] + generator.normal(size=(len(labels), width))) @ mixed
    return rows.astype(np.float32), labels


def write_embeddings(path: Path, **changes: np.ndarray | None) -> Path:
    """A FILE.npz that is not compressed, with its own splits of 20 and 5 a class; None leaves an array out."""
    (x_train, y_train), (x_test, y_test) = toy_embeddings(20), toy_embeddings(5, seed=1)
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    arrays |= {"class_names": np.array(CLASS_NAMES), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})  # type: ignore[arg-type]
    return path
