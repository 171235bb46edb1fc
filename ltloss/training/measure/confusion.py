"""Confusions between classes: counts of the pairs that occur, never a C×C matrix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

SHOWN_WHOLE = 20  # up to so many classes the matrix shows each of them
_FOLDED = 15  # of more classes it shows these, and all others together


@dataclass(frozen=True)
class Confusion:
    """``images`` test images of class ``label``, a ``fraction`` of that class, were predicted as ``predicted``."""

    label: int
    predicted: int
    images: int
    fraction: float


@dataclass(frozen=True)
class ConfusionMatrix:
    """``counts[i][j]``: images of ``classes[i]`` that were predicted as ``classes[j]``.

    With ``others`` one more row and column hold all other classes together. The cell where they meet counts right and
    wrong predictions alike. The counts add up to the number of images in the split.
    """

    classes: tuple[int, ...]
    others: bool
    counts: tuple[tuple[int, ...], ...]


def class_scores(correct: np.ndarray, images: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and F1 (C,) of classes from three counts (C,): right predictions, test images, predictions.

        precision_c = correct_c / predicted_c,  F1_c = 2·correct_c / (images_c + predicted_c)

    F1 is the harmonic mean of precision and recall; the recall of a class is its accuracy. The precision of a class
    without prediction and the F1 of a class without right prediction are 0, as in scikit-learn's
    ``precision_recall_fscore_support(zero_division=0)``. Both are NaN for a class with neither test image nor
    prediction, which counts in no mean, as with scikit-learn's ``labels=None``. The mean of F1 is "averaged F1" in
    Opitz and Burst, Macro F1 and macro F1, 2019, section 2.

    Example:
        >>> import numpy as np
        >>> from ltloss.training.measure.confusion import class_scores
        >>> precision, f1 = class_scores(np.array([2, 0, 0]), np.array([4, 1, 0]), np.array([2, 3, 0]))
        >>> precision.tolist(), f1.round(4).tolist()
        ([1.0, 0.0, nan], [0.6667, 0.0, nan])
    """
    known = images + predicted > 0
    precision = np.where(known, 0.0, np.nan)
    np.divide(correct, predicted, out=precision, where=predicted > 0)
    f1 = np.divide(2 * correct, images + predicted, out=np.full(len(known), np.nan), where=known)
    return precision, f1


class ConfusionCounts:
    """Collects wrong predictions; memory is one number for each, whatever the number of classes."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._wrong: list[np.ndarray] = []  # label · C + predicted

    def add(self, labels: np.ndarray, predicted: np.ndarray) -> None:
        """Add the wrong ones of the predictions (B,) for images with labels (B,)."""
        wrong = labels != predicted
        self._wrong.append(labels[wrong] * self._classes + predicted[wrong])

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Label, predicted class and number of images, (P,) each, of the pairs that occur, largest first.

        Pairs with equally many images are sorted by label, then by predicted class.
        """
        keys = np.concatenate([np.empty(0, np.int64), *self._wrong])
        pairs, images = np.unique(keys, return_counts=True)
        order = np.argsort(-images, kind="stable")
        label, predicted = np.divmod(pairs[order], self._classes)
        return label, predicted, images[order]


def largest(
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray], class_images: np.ndarray, limit: int
) -> tuple[Confusion, ...]:
    """The first ``limit`` of ``pairs`` as confusions; ``class_images`` (C,) are the test images of each class."""
    rows = islice(zip(*(column.tolist() for column in pairs), strict=True), limit)
    return tuple(Confusion(a, b, images, images / int(class_images[a])) for a, b, images in rows)


def classes_to_look_at(pairs: Iterable[tuple[int, int]], class_images: np.ndarray, limit: int) -> list[int]:
    """At most ``limit`` classes: those of ``pairs`` in order, then those with the most test images (C,)."""
    most = np.argsort(-class_images, kind="stable")[:limit].tolist()
    return list(islice(dict.fromkeys(chain(chain.from_iterable(pairs), most)), limit))


def confusion_matrix(
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray], correct: np.ndarray, class_images: np.ndarray
) -> ConfusionMatrix:
    """The matrix of all classes if there are at most 20; else of the 15 in the largest confusions, and all others.

    Args:
        pairs: from :meth:`ConfusionCounts.pairs`.
        correct: right predictions (C,).
        class_images: test images (C,).
    """
    label, predicted, images = pairs
    count = len(correct)
    if count <= SHOWN_WHOLE:
        classes = list(range(count))
    else:
        classes = classes_to_look_at(
            zip(label[:count].tolist(), predicted[:count].tolist(), strict=True), class_images, _FOLDED
        )
    slot = np.full(count, len(classes))
    slot[classes] = np.arange(len(classes))
    counts = np.zeros((len(classes) + 1, len(classes) + 1), dtype=np.int64)
    np.add.at(counts, (slot[label], slot[predicted]), images)
    np.add.at(counts, (slot, slot), correct)
    others = count > len(classes)
    shown = counts if others else counts[:-1, :-1]
    return ConfusionMatrix(tuple(classes), others, tuple(map(tuple, shown.tolist())))
