"""Labels of data files as integers from 0, and the names of their classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ltloss.errors import UserError

_RENUMBER = "renumber the labels with numpy.unique(labels, return_inverse=True)"


def whole_labels(path: Path, key: str, labels: np.ndarray) -> np.ndarray:
    """Labels (N,) int64; UserError that names ``key`` for another shape or type."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(
            f"{path}: {key} must be integers of shape (N,), but is {labels.dtype} of shape {labels.shape}; convert it"
        )
    if labels.size and int(labels.max()) > np.iinfo(np.int64).max:
        raise UserError(f"{path}: {key} goes up to {labels.max()}, beyond every number of classes; {_RENUMBER}")
    return labels.astype(np.int64)


def names_of_classes(path: Path, key: str, labels: np.ndarray, given: np.ndarray | None) -> tuple[str, ...]:
    """The names given, or else the numbers up to the largest label; UserError for a class without training samples."""
    if given is not None:
        if given.ndim != 1 or given.dtype.kind != "U" or len(set(given.tolist())) != len(given):
            raise UserError(
                f"{path}: class_names must be a list of different strings, but is {given.dtype} of shape {given.shape}"
            )
        names = tuple(str(name) for name in given)
    else:
        largest = int(labels.max(initial=-1))
        if largest >= len(labels) > 0:  # most classes would be empty, and their names alone could fill the memory
            raise UserError(
                f"{path}: {key} goes up to {largest} but has only {len(labels)} labels, so some classes have no "
                f"sample; {_RENUMBER}"
            )
        names = tuple(str(c) for c in range(largest + 1))
    if len(names) < 2:
        raise UserError(f"{path} has {len(names)} classes, at least 2 are needed; check {key}")
    check_range(path, key, labels, len(names))
    empty = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if len(empty):
        raise UserError(
            f"{path}: {len(empty)} of {len(names)} classes have no training sample, the first is {names[empty[0]]}; "
            "renumber the labels without them"
        )
    return names


def check_range(path: Path, key: str, labels: np.ndarray, classes: int) -> None:
    """Raise UserError for the first label that is not in 0..classes - 1."""
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        raise UserError(f"{path}: {key}[{bad[0]}] is {labels[bad[0]]}, outside 0..{classes - 1}; correct the labels")


def numbered(path: Path, key: str, labels: np.ndarray, class_names: tuple[str, ...]) -> np.ndarray:
    """Labels (N,) int64 from labels that are numbers or names of classes."""
    if labels.dtype.kind != "U" or labels.ndim != 1:
        labels = whole_labels(path, key, labels)
        check_range(path, key, labels, len(class_names))
        return labels
    numbers = {name: number for number, name in enumerate(class_names)}
    found = np.array([numbers.get(name, -1) for name in labels.tolist()], dtype=np.int64)
    bad = np.flatnonzero(found < 0)
    if len(bad):
        raise UserError(
            f"{path}: {key}[{bad[0]}] is {labels[bad[0]]!r}, none of the {len(class_names)} classes; correct the labels"
        )
    return found
