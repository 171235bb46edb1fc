from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from ltloss.training.measure.class_groups import Thresholds
from ltloss.training.measure.confusion import ConfusionMatrix
from ltloss.training.measure.details import Details, DetailsAccumulator, Mistake
from ltloss.training.measure.metrics import BatchResult

NAMES = ("apple", "bean", "corn")


def found(labels: list[int], predicted: list[int], confidence: list[float], at_once: int = 100) -> Details:
    """The details of images called p0, p1 …, ``at_once`` in a batch."""
    accumulator = DetailsAccumulator([9, 9, 9], Thresholds(5, 2))
    columns = np.array(labels, np.int64), np.array(predicted, np.int64), np.array(confidence)
    for start in range(0, len(labels), at_once):
        label, index, sure = (column[start : start + at_once] for column in columns)
        accumulator.add(BatchResult(label, index, label == index, sure, sure, sure, sure))
    return accumulator.result([f"p{n}" for n in range(len(labels))])[1]


def test_the_most_confident_errors_come_first_and_of_equal_ones_the_first_image() -> None:
    given = [0, 1, 2, 0, 1], [1, 1, 0, 2, 0], [0.5, 0.99, 0.7, 0.7, math.nan]
    for at_once in (100, 1):
        assert found(*given, at_once=at_once).mistakes == (
            Mistake(2, "p2", 2, 0, 0.7),
            Mistake(3, "p3", 0, 2, 0.7),
            Mistake(0, "p0", 0, 1, 0.5),
        )


def test_the_number_of_errors_shown_is_bounded() -> None:
    count = 1000
    mistakes = found([0] * count, [1] * count, np.linspace(0, 1, count).tolist(), at_once=64).mistakes
    assert [mistake.index for mistake in mistakes] == list(range(999, 999 - 24, -1))


def test_details_by_hand() -> None:
    details = found([0, 0, 0, 1], [0, 1, 1, 1], [0.9] * 4)
    assert details.class_images == (3, 1, 0)
    assert details.precision == (1.0, pytest.approx(1 / 3), None)
    assert details.f1 == (pytest.approx(1 / 2), pytest.approx(1 / 2), None)
    assert details.matrix == ConfusionMatrix((0, 1, 2), False, ((1, 2, 0), (0, 1, 0), (0, 0, 0)))
    assert [one.images for one in details.calibration] == [0] * 13 + [4, 0]


def test_what_is_stored_comes_back() -> None:
    details = found([0, 0, 0, 1], [0, 1, 1, 1], [0.9, 0.4, 0.3, math.nan])
    stored = json.loads(json.dumps(details.stored(NAMES), allow_nan=False))
    assert stored["confusions"] == [{"true": "apple", "predicted": "bean", "count": 2, "fraction": 2 / 3}]
    assert stored["confident_errors"][0] == {
        "index": 1, "image": "p1", "true": "apple", "predicted": "bean", "probability": 0.4
    }  # fmt: skip
    assert Details.from_stored(stored, NAMES) == details


def _damaged(stored: dict[str, Any], path: tuple[Any, ...], value: object) -> dict[str, Any]:
    inner: Any = stored
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return stored


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("confusions",), None),
        (("confusions", 0, "true"), "pear"),
        (("confusion_matrix", "counts"), [[1, 2]]),
        (("per_class_f1",), {"apple": 1.0}),
        (("per_class_f1", "bean"), "much"),
        (("calibration", 0), 5),
        (("confident_errors", 0, "index"), None),
    ],
)
def test_what_was_stored_by_nobody_is_refused(path: tuple[Any, ...], value: object) -> None:
    stored = json.loads(json.dumps(found([0, 0, 1], [0, 1, 0], [0.9, 0.4, 0.3]).stored(NAMES)))
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        Details.from_stored(_damaged(stored, path, value), NAMES)
