"""The metrics of a classifier: accuracy by class size, calibration, and the geometry of the features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltloss._deprecation import renamed_fields
from ltloss.training.measure.calibration import Calibration
from ltloss.training.measure.class_groups import Thresholds
from ltloss.training.measure.confusion import class_scores

# One row of metrics.csv.
COLUMNS = (
    *("epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "top5_accuracy"),
    *("balanced_accuracy", "macro_f1"),
    *("many", "medium", "few", "calibration_error", "feature_norm_mean", "own_angle_mean"),
    *("validation_balanced_accuracy", "seconds"),
)


@renamed_fields(pictures="images")
@dataclass(frozen=True)
class Metrics:
    """The metrics on one split. Fractions are in [0, 1], angles in radians; None where nothing could be measured.

    Attributes:
        images: number of images in the split.
        loss: cross-entropy of the logits without margin, in nats.
        accuracy: fraction of images classified correctly (top-1).
        top5_accuracy: fraction of images whose class has one of the five largest logits; 1 with at most five classes.
        balanced_accuracy: mean accuracy of the classes that have images in the split, as scikit-learn's
            ``balanced_accuracy_score``.
        macro_f1: mean of F1_c = 2·TP_c / (2·TP_c + FP_c + FN_c) over the classes that have an image or a prediction in
            the split, as scikit-learn's ``f1_score(average="macro", zero_division=0)``. A class without image that is
            predicted, and a class with images that never is, count as 0 (Opitz and Burst, Macro F1 and macro F1, 2019).
        many, medium, few: mean accuracy of the group's classes that have images in the split, as ImageNet-LT reports.
        calibration_error: expected calibration error of the softmax of the logits, in 15 bins (Guo et al., On
            calibration of modern neural networks, ICML 2017, eq. 3).
        per_class: accuracy of each class, (C,); None for a class without images.
        feature_norm_mean: mean length of the features.
        own_angle_mean: mean angle between a feature and the prototype of its target class, in radians.
    """

    images: int
    loss: float | None
    accuracy: float | None
    top5_accuracy: float | None
    balanced_accuracy: float | None
    macro_f1: float | None
    many: float | None
    medium: float | None
    few: float | None
    calibration_error: float | None
    per_class: tuple[float | None, ...]
    feature_norm_mean: float | None
    own_angle_mean: float | None


def target_angles(features: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    """Angle (N,) in radians between each feature (N, D) and its target prototype, accurate near 0 and π.

    With prototypes (C, K, D) it is the angle to the nearest of the target's K sub-centres.
    """
    w = F.normalize(prototypes[labels].float(), dim=-1)
    x = F.normalize(features, dim=1).view(-1, *[1] * (w.dim() - 2), w.shape[-1])
    angles = 2 * torch.atan2((x - w).norm(dim=-1), (x + w).norm(dim=-1))
    return angles if w.dim() == 2 else angles.amin(1)


@dataclass(frozen=True)
class BatchResult:
    """Results of a classifier on B images, arrays (B,) each."""

    labels: np.ndarray  # int64
    predicted: np.ndarray  # int64
    in_top5: np.ndarray  # bool: whether the label has one of the five largest logits
    confidence: np.ndarray  # float64: the probability of the predicted class
    losses: np.ndarray  # float64: cross-entropy without margin
    norms: np.ndarray  # float64: lengths of the features
    angles: np.ndarray  # float64: radians to the target prototype


class MetricsAccumulator:
    """Collects the batches of one split; ``result`` returns their metrics.

    For each class ``images``, ``correct`` and ``predicted``, (C,) int64, count its images, the right predictions of
    these, and the predictions of the class.
    """

    def __init__(self, class_counts: Sequence[int], thresholds: Thresholds) -> None:
        self._class_counts, self._thresholds = class_counts, thresholds
        self.images, self.correct, self.predicted = np.zeros((3, len(class_counts)), dtype=np.int64)
        self.calibration = Calibration()
        self._in_top5 = 0
        self._sums = np.zeros(3)  # loss, feature length, angle to the target prototype

    def add(self, batch: BatchResult) -> None:
        """Add one batch."""
        classes = len(self.images)
        right = batch.predicted == batch.labels
        self.images += np.bincount(batch.labels, minlength=classes)
        self.correct += np.bincount(batch.labels[right], minlength=classes)
        self.predicted += np.bincount(batch.predicted, minlength=classes)
        self.calibration.add(batch.confidence, right)
        self._in_top5 += int((batch.in_top5 | right).sum())
        self._sums += [values.sum() for values in (batch.losses, batch.norms, batch.angles)]

    def result(self) -> Metrics:
        """The metrics of all batches so far."""
        count = int(self.images.sum())
        present = self.images > 0
        per_class = np.divide(self.correct, self.images, out=np.full(len(present), np.nan), where=present)
        _, f1 = class_scores(self.correct, self.images, self.predicted)
        loss, norm, angle = (float(total) / count if count else None for total in self._sums)
        return Metrics(
            images=count,
            loss=loss,
            accuracy=float(self.correct.sum()) / count if count else None,
            top5_accuracy=self._in_top5 / count if count else None,
            balanced_accuracy=float(per_class[present].mean()) if count else None,
            macro_f1=float(np.nanmean(f1)) if count else None,
            **self._thresholds.means(per_class, self._class_counts),
            calibration_error=self.calibration.error(),
            per_class=or_none(per_class),
            feature_norm_mean=norm,
            own_angle_mean=angle,
        )


def or_none(values: np.ndarray) -> tuple[float | None, ...]:
    """Numbers (N,) with None in place of NaN."""
    return tuple(None if math.isnan(value) else value for value in values.tolist())


def percent(fraction: float | None) -> str:
    """A fraction as '93.4', None as a dash."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def number(value: float | None) -> str:
    """A number with three decimals, None as a dash."""
    return "–" if value is None else f"{value:.3f}"
