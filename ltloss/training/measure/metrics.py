"""What is measured of a classifier: accuracy by class size, and the geometry that the losses shape."""

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
    """Measured on one split. Fractions are in [0, 1], angles in radians; None where nothing could be measured.

    ``accuracy`` (top-1) is the fraction of images classified correctly, ``top5_accuracy`` that of images whose class is
    among the five of largest logit (all of them where there are no more than five classes). ``many``, ``medium`` and
    ``few`` are the mean of their classes' accuracies (as ImageNet-LT reports them), over classes that have images in
    the split, and ``balanced_accuracy`` that of all of them, as in scikit-learn's ``balanced_accuracy_score``.
    ``macro_f1`` is the mean of F1_c = 2·TP_c / (2·TP_c + FP_c + FN_c) over the classes that have an image or a
    prediction in the split, scikit-learn's ``f1_score(average="macro", zero_division=0)``: a class without image that
    is predicted, and one with images that never is, count as 0 (Opitz and Burst, Macro F1 and macro F1, 2019).
    ``calibration_error`` is the expected one of the softmax of the logits in 15 bins (Guo et al., On calibration of
    modern neural networks, ICML 2017, eq. 3)."""

    images: int  # in the split
    loss: float | None  # cross-entropy of the logits without margin
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
    own_angle_mean: float | None  # between a feature and the prototype of its target class


def target_angles(features: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    """Angle (N,) in radians between each feature (N, D) and its target prototype, exact near 0 and pi.

    Of prototypes (C, K, D) the nearest of the target's K counts.
    """
    w = F.normalize(prototypes[labels].float(), dim=-1)
    x = F.normalize(features, dim=1).view(-1, *[1] * (w.dim() - 2), w.shape[-1])
    angles = 2 * torch.atan2((x - w).norm(dim=-1), (x + w).norm(dim=-1))
    return angles if w.dim() == 2 else angles.amin(1)


@dataclass(frozen=True)
class BatchResult:
    """What a classifier made of B images, arrays (B,) each."""

    labels: np.ndarray  # int64
    predicted: np.ndarray  # int64
    in_top5: np.ndarray  # bool: whether the label is among the five classes of largest logit
    confidence: np.ndarray  # float64: the probability of the predicted class
    losses: np.ndarray  # float64
    norms: np.ndarray  # float64
    angles: np.ndarray  # float64, radians


class MetricsAccumulator:
    """Collects batches of one split; ``result`` is the metrics of all of them.

    ``images``, ``correct`` and ``predicted`` (C,) int64 count, by class, its images, its right predictions, and all
    predictions of it.
    """

    def __init__(self, class_counts: Sequence[int], thresholds: Thresholds) -> None:
        self._class_counts, self._thresholds = class_counts, thresholds
        self.images, self.correct, self.predicted = np.zeros((3, len(class_counts)), dtype=np.int64)
        self.calibration = Calibration()
        self._in_top5 = 0
        self._sums = np.zeros(3)  # loss, feature length, angle to the target prototype

    def add(self, batch: BatchResult) -> None:
        """Count one batch."""
        classes = len(self.images)
        right = batch.predicted == batch.labels
        self.images += np.bincount(batch.labels, minlength=classes)
        self.correct += np.bincount(batch.labels[right], minlength=classes)
        self.predicted += np.bincount(batch.predicted, minlength=classes)
        self.calibration.add(batch.confidence, right)
        self._in_top5 += int((batch.in_top5 | right).sum())
        self._sums += [values.sum() for values in (batch.losses, batch.norms, batch.angles)]

    def result(self) -> Metrics:
        """The metrics of everything added so far."""
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
    """Numbers (N,), None in place of NaN."""
    return tuple(None if math.isnan(value) else value for value in values.tolist())


def percent(fraction: float | None) -> str:
    """A fraction as '93.4', None as a dash."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def number(value: float | None) -> str:
    """A number with three decimals, None as a dash."""
    return "–" if value is None else f"{value:.3f}"
