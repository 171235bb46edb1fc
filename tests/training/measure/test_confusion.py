from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as sklearn_matrix
from sklearn.metrics import precision_recall_fscore_support

from ltloss.training.measure.confusion import Confusion, ConfusionCounts, class_scores, confusion_matrix, largest


def counted(labels: np.ndarray, predicted: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right predictions, test images and predictions of each class."""
    right = labels == predicted
    columns = (labels[right], labels, predicted)
    return tuple(np.bincount(column, minlength=classes) for column in columns)  # type: ignore[return-value]


@pytest.mark.parametrize(("classes", "images"), [(1, 3), (6, 40), (200, 90)])
def test_scores_of_classes_are_those_of_scikit_learn(classes: int, images: int) -> None:
    labels, predicted = np.random.default_rng(classes).integers(0, classes, (2, images))
    precision, f1 = class_scores(*counted(labels, predicted, classes))
    known = np.unique([labels, predicted])  # what scikit-learn looks at
    expected = precision_recall_fscore_support(labels, predicted, labels=known, zero_division=0)
    assert precision[known] == pytest.approx(expected[0])
    assert f1[known] == pytest.approx(expected[2])
    assert np.isnan(np.delete(precision, known)).all()
    assert np.isnan(np.delete(f1, known)).all()


def test_the_largest_confusions_come_first_and_of_equal_ones_the_first_class() -> None:
    found = ConfusionCounts(4)
    found.add(np.array([3, 3, 0, 2]), np.array([1, 1, 0, 0]))
    found.add(np.array([3, 0, 1]), np.array([1, 3, 2]))
    rows = largest(found.pairs(), np.array([2, 1, 1, 6]), 3)
    assert rows == (Confusion(3, 1, 3, 0.5), Confusion(0, 3, 1, 0.5), Confusion(1, 2, 1, 1.0))


def test_few_classes_have_the_whole_matrix() -> None:
    labels, predicted = np.random.default_rng(0).integers(0, 20, (2, 300))
    found = ConfusionCounts(20)
    found.add(labels, predicted)
    correct, images, _ = counted(labels, predicted, 20)
    matrix = confusion_matrix(found.pairs(), correct, images)
    assert (matrix.classes, matrix.others) == (tuple(range(20)), False)
    assert np.array_equal(matrix.counts, sklearn_matrix(labels, predicted, labels=range(20)))


def test_many_classes_are_folded_around_the_largest_confusions() -> None:
    generator = np.random.default_rng(1)
    labels, predicted = generator.integers(0, 50, (2, 400))
    labels[:90], predicted[:90] = 7, np.repeat([41, 3, 7], 30)
    found = ConfusionCounts(50)
    found.add(labels, predicted)
    correct, images, _ = counted(labels, predicted, 50)
    matrix = confusion_matrix(found.pairs(), correct, images)
    assert matrix.classes[:3] == (7, 3, 41)
    assert len(set(matrix.classes)) == 15
    assert matrix.others
    slot = np.full(50, 15)
    slot[list(matrix.classes)] = range(15)
    assert np.array_equal(matrix.counts, sklearn_matrix(slot[labels], slot[predicted], labels=range(16)))


def test_without_a_wrong_prediction_the_classes_with_most_images_are_shown() -> None:
    images = np.arange(30)
    matrix = confusion_matrix(ConfusionCounts(30).pairs(), images, images)
    assert matrix.classes == tuple(range(29, 14, -1))
    assert np.array_equal(matrix.counts, np.diag([*range(29, 14, -1), sum(range(15))]))


def test_no_matrix_of_all_classes_is_made() -> None:
    classes = 1_000_000
    labels, predicted = np.random.default_rng(0).integers(0, classes, (2, 1000))
    tracemalloc.start()
    found = ConfusionCounts(classes)
    found.add(labels, predicted)
    correct, images, _ = counted(labels, predicted, classes)
    confusion_matrix(found.pairs(), correct, images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * classes  # bytes
