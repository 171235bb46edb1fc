from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score

from ltloss.training.measure.class_groups import Thresholds
from ltloss.training.measure.metrics import BatchResult, MetricsAccumulator, percent, target_angles


def results(labels: list[int], predicted: list[int], *, confidence: list[float] | None = None) -> BatchResult:
    """Images with losses 0, 1, 2 …, feature lengths one more and angles of a tenth; the label is never in the top 5."""
    values = np.arange(len(labels), dtype=np.float64)
    sure = np.ones(len(labels)) if confidence is None else np.array(confidence)
    never = np.zeros(len(labels), dtype=bool)
    return BatchResult(
        np.array(labels, dtype=np.int64),
        np.array(predicted, dtype=np.int64),
        never,
        sure,
        values,
        values + 1,
        values / 10,
    )


def accumulate(
    counts: list[int], labels: list[int], predicted: list[int], thresholds: Thresholds
) -> MetricsAccumulator:
    found = MetricsAccumulator(counts, thresholds)
    found.add(results(labels, predicted))
    return found


def test_groups_are_means_of_class_accuracies() -> None:
    # Classes 0 and 1 are many (accuracies 1 and 0.5), class 2 medium (0), class 3 few (1).
    found = accumulate([500, 101, 100, 19], [0, 1, 1, 2, 3], [0, 1, 0, 1, 3], Thresholds()).result()
    assert found.accuracy == pytest.approx(3 / 5)
    assert found.many == pytest.approx(0.75)
    assert found.medium == 0.0
    assert found.few == 1.0
    assert found.per_class == (1.0, 0.5, 0.0, 1.0)
    assert (found.loss, found.feature_norm_mean) == (pytest.approx(2.0), pytest.approx(3.0))
    assert found.own_angle_mean == pytest.approx(0.2)
    assert found.balanced_accuracy == pytest.approx(2.5 / 4)
    assert found.calibration_error == pytest.approx(2 / 5)  # always sure, and wrong twice
    # F1: class 0 was found once more than it is there, class 1 once too rarely and once too often, class 2 never.
    assert found.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 0 + 1) / 4)


def test_a_class_in_the_top_5_or_predicted_counts_there() -> None:
    found, batch = MetricsAccumulator([9] * 9, Thresholds(5, 2)), results([0, 1, 2, 3], [0, 5, 5, 5])
    found.add(replace(batch, in_top5=np.array([False, True, False, False])))  # the first is a tie that top-1 won
    assert (found.result().accuracy, found.result().top5_accuracy) == (0.25, 0.5)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")  # which scikit-learn leaves out, as we do
@pytest.mark.parametrize("classes", [2, 7, 40])
def test_means_over_classes_are_those_of_scikit_learn(classes: int) -> None:
    generator = np.random.default_rng(classes)
    for images in (1, 5, 60):  # of 40 classes many have no image, or no prediction, or neither
        labels, predicted = generator.integers(0, classes, (2, images))
        found = accumulate([9] * classes, labels.tolist(), predicted.tolist(), Thresholds(5, 2)).result()
        assert found.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))
        assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, predicted))


@pytest.mark.parametrize(
    ("count", "group"), [(101, "many"), (100, "medium"), (20, "medium"), (19, "few")], ids=lambda value: str(value)
)
def test_limits_belong_to_medium(count: int, group: str) -> None:
    groups = Thresholds().groups([count])
    assert [name for name, mask in groups.items() if mask[0]] == [group]


def test_what_cannot_be_measured_is_none() -> None:
    found = accumulate([500, 500, 5], [0, 0], [0, 1], Thresholds()).result()
    assert (found.many, found.medium, found.few) == (0.5, None, None)
    assert (found.balanced_accuracy, found.macro_f1) == (0.5, pytest.approx((2 / 3 + 0) / 2))
    assert found.per_class == (0.5, None, None)
    nothing = MetricsAccumulator([500], Thresholds()).result()
    assert (nothing.accuracy, nothing.loss, nothing.own_angle_mean) == (None, None, None)
    assert (nothing.top5_accuracy, nothing.macro_f1, nothing.calibration_error) == (None, None, None)


def test_batches_add_up() -> None:
    together = accumulate([9, 9], [0, 1, 1], [0, 0, 1], Thresholds(5, 2)).result()
    apart = MetricsAccumulator([9, 9], Thresholds(5, 2))
    whole = results([0, 1, 1], [0, 0, 1])
    for i in range(3):
        apart.add(BatchResult(**{name: column[i : i + 1] for name, column in vars(whole).items()}))
    assert apart.result() == together


def test_angles_are_exact_where_arccos_is_not() -> None:
    tiny = 1e-4
    features = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [math.cos(tiny), math.sin(tiny)]])
    angles = target_angles(features, torch.tensor([[5.0, 0.0]]), torch.zeros(4, dtype=torch.int64))
    assert angles.tolist() == pytest.approx([0.0, math.pi / 2, math.pi, tiny], rel=1e-3)
    several = torch.tensor([[[0.0, 1.0], [0.0, -2.0]], [[5.0, 0.0], [0.0, 7.0]]])  # class 1: along x and along y
    angles = target_angles(features, several, torch.ones(4, dtype=torch.int64))
    assert angles.tolist() == pytest.approx([0.0, 0.0, math.pi / 2, tiny], rel=1e-3)


def test_empty_group_is_printed_as_a_dash() -> None:
    assert percent(None) == "–"
    assert percent(0.0) == "0.0"
