"""Details beside the metrics: scores by class, confusions, calibration and mistakes, also as evaluation.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ltloss.training.measure.calibration import CalibrationBin
from ltloss.training.measure.class_groups import Thresholds
from ltloss.training.measure.confusion import (
    Confusion,
    ConfusionCounts,
    ConfusionMatrix,
    class_scores,
    confusion_matrix,
    largest,
)
from ltloss.training.measure.metrics import BatchResult, Metrics, MetricsAccumulator, or_none

_CONFUSIONS = 100  # how many are kept
_MISTAKES = 24


@dataclass(frozen=True)
class Mistake:
    """A wrong prediction, and its probability: image number ``index`` of the split, called ``image``."""

    index: int
    image: str
    label: int
    predicted: int
    probability: float


@dataclass(frozen=True)
class Details:
    """Where a classifier is right and wrong on one split.

    Attributes:
        class_images: test images of each class, (C,).
        precision, f1: of each class, (C,), as :func:`~ltloss.training.measure.confusion.class_scores` defines them;
            None for a class with neither test image nor prediction.
        confusions: the 100 largest confusions, largest first.
        matrix: as :func:`~ltloss.training.measure.confusion.confusion_matrix` returns it.
        calibration: accuracy by probability, in 15 bins.
        mistakes: the 24 wrong predictions with the largest probability, largest first.
    """

    class_images: tuple[int, ...]
    precision: tuple[float | None, ...]
    f1: tuple[float | None, ...]
    confusions: tuple[Confusion, ...]
    matrix: ConfusionMatrix
    calibration: tuple[CalibrationBin, ...]
    mistakes: tuple[Mistake, ...]

    def stored(self, class_names: Sequence[str]) -> dict[str, Any]:
        """The details as values for JSON; classes are given by name."""
        return {
            "per_class_images": dict(zip(class_names, self.class_images, strict=True)),
            "per_class_precision": dict(zip(class_names, self.precision, strict=True)),
            "per_class_f1": dict(zip(class_names, self.f1, strict=True)),
            "confusions": [
                {
                    "true": class_names[found.label],
                    "predicted": class_names[found.predicted],
                    "count": found.images,
                    "fraction": found.fraction,
                }
                for found in self.confusions
            ],
            "confusion_matrix": {
                "classes": [class_names[c] for c in self.matrix.classes],
                "others": self.matrix.others,
                "counts": self.matrix.counts,
            },
            "calibration": [
                {
                    "from": found.low,
                    "to": found.high,
                    "count": found.images,
                    "confidence": found.confidence,
                    "accuracy": found.accuracy,
                }
                for found in self.calibration
            ],
            "confident_errors": [
                {
                    "index": found.index,
                    "image": found.image,
                    "true": class_names[found.label],
                    "predicted": class_names[found.predicted],
                    "probability": found.probability,
                }
                for found in self.mistakes
            ],
        }

    @classmethod
    def from_stored(cls, values: Mapping[str, Any], class_names: Sequence[str]) -> Details:
        """The inverse of :meth:`stored`; KeyError, TypeError, ValueError or AttributeError for other values."""
        number = {name: c for c, name in enumerate(class_names)}
        matrix = values["confusion_matrix"]
        counts = tuple(tuple(map(int, row)) for row in matrix["counts"])
        side = len(matrix["classes"]) + bool(matrix["others"])
        if [len(row) for row in counts] != [side] * side:
            raise ValueError("the confusion matrix is not square")
        return cls(
            tuple(int(values["per_class_images"][name]) for name in class_names),
            tuple(_fraction(values["per_class_precision"][name]) for name in class_names),
            tuple(_fraction(values["per_class_f1"][name]) for name in class_names),
            tuple(
                Confusion(number[row["true"]], number[row["predicted"]], int(row["count"]), float(row["fraction"]))
                for row in values["confusions"]
            ),
            ConfusionMatrix(tuple(number[name] for name in matrix["classes"]), bool(matrix["others"]), counts),
            tuple(
                CalibrationBin(
                    *(float(row["from"]), float(row["to"]), int(row["count"])),
                    *(_fraction(row["confidence"]), _fraction(row["accuracy"])),
                )
                for row in values["calibration"]
            ),
            tuple(
                Mistake(
                    *(int(row["index"]), str(row["image"]), number[row["true"]], number[row["predicted"]]),
                    float(row["probability"]),
                )
                for row in values["confident_errors"]
            ),
        )


def _fraction(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{value} is no fraction")
    return value


class DetailsAccumulator:
    """Collects the batches of one split; ``result`` returns their metrics and details."""

    def __init__(self, class_counts: Sequence[int], thresholds: Thresholds) -> None:
        self._metrics = MetricsAccumulator(class_counts, thresholds)
        self._confusion = ConfusionCounts(len(class_counts))
        self._seen = 0
        self._mistakes: list[tuple[float, int, int, int]] = []  # probability, index, label, predicted

    def add(self, batch: BatchResult) -> None:
        """Add one batch; batches must come in the order of the split."""
        self._metrics.add(batch)
        self._confusion.add(batch.labels, batch.predicted)
        wrong = np.flatnonzero((batch.labels != batch.predicted) & np.isfinite(batch.confidence))
        worst = wrong[np.argsort(-batch.confidence[wrong], kind="stable")[:_MISTAKES]]
        columns = (batch.confidence[worst], worst + self._seen, batch.labels[worst], batch.predicted[worst])
        self._mistakes += zip(*(column.tolist() for column in columns), strict=True)
        self._mistakes = sorted(self._mistakes, key=lambda found: (-found[0], found[1]))[:_MISTAKES]
        self._seen += len(batch.labels)

    def result(self, names: Sequence[str]) -> tuple[Metrics, Details]:
        """The metrics and details of all batches so far; ``names`` are the names of the split's images."""
        counts = self._metrics
        pairs = self._confusion.pairs()
        precision, f1 = class_scores(counts.correct, counts.images, counts.predicted)
        details = Details(
            class_images=tuple(counts.images.tolist()),
            precision=or_none(precision),
            f1=or_none(f1),
            confusions=largest(pairs, counts.images, _CONFUSIONS),
            matrix=confusion_matrix(pairs, counts.correct, counts.images),
            calibration=counts.calibration.bins(),
            mistakes=tuple(
                Mistake(index, str(names[index]), label, predicted, probability)
                for probability, index, label, predicted in self._mistakes
            ),
        )
        return counts.result(), details
