from __future__ import annotations

import math

import pytest
import torch

from ltloss.training.measure.class_groups import Thresholds
from ltloss.training.measure.metrics import MetricsAccumulator, percent, target_angles


def accumulate(
    counts: list[int], labels: list[int], predicted: list[int], thresholds: Thresholds
) -> MetricsAccumulator:
    found = MetricsAccumulator(counts, thresholds)
    values = torch.arange(len(labels), dtype=torch.float32)
    found.add(
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(predicted, dtype=torch.int64),
        torch.ones(len(labels)),
        values,
        values + 1,
        values / 10,
    )
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


def test_calibration_error_is_the_weighted_gap_of_15_bins() -> None:
    confidence = torch.tensor([0.05, 0.06, 0.07, 0.55, 0.58, 1.0])
    right = torch.tensor([0, 1, 1, 1, 0, 1])
    found = MetricsAccumulator([9, 9], Thresholds(5, 2))
    labels, zeros = torch.zeros(6, dtype=torch.int64), torch.zeros(6)
    found.add(labels, 1 - right, confidence, zeros, zeros, zeros)
    gaps = abs(1 - 0.05 - 0.06) + abs(1 - 0.07) + abs(1 - 0.55 - 0.58) + abs(1 - 1.0)
    assert found.result().calibration_error == pytest.approx(gaps / 6, abs=1e-7)


@pytest.mark.parametrize(
    ("count", "group"), [(101, "many"), (100, "medium"), (20, "medium"), (19, "few")], ids=lambda value: str(value)
)
def test_limits_belong_to_medium(count: int, group: str) -> None:
    groups = Thresholds().groups([count])
    assert [name for name, mask in groups.items() if mask[0]] == [group]


def test_what_cannot_be_measured_is_none() -> None:
    found = accumulate([500, 500, 5], [0, 0], [0, 1], Thresholds()).result()
    assert (found.many, found.medium, found.few) == (0.5, None, None)
    assert found.per_class == (0.5, None, None)
    nothing = MetricsAccumulator([500], Thresholds()).result()
    assert (nothing.accuracy, nothing.loss, nothing.own_angle_mean) == (None, None, None)


def test_batches_add_up() -> None:
    together = accumulate([9, 9], [0, 1, 1], [0, 0, 1], Thresholds(5, 2)).result()
    apart = MetricsAccumulator([9, 9], Thresholds(5, 2))
    for i in range(3):
        one = [torch.tensor([row[i]]) for row in ([0, 1, 1], [0, 0, 1])]
        apart.add(*one, torch.ones(1), *(torch.tensor([value]) for value in (float(i), i + 1.0, i / 10)))
    assert apart.result().accuracy == together.accuracy
    assert apart.result().per_class == together.per_class
    assert apart.result().loss == pytest.approx(together.loss)


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
