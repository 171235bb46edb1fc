"""What is measured of a classifier: accuracy by class size, and the geometry that the losses shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltloss._deprecation import renamed_fields
from ltloss.training.measure.class_groups import Thresholds

# One row of metrics.csv.
COLUMNS = (
    *("epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "balanced_accuracy"),
    *("many", "medium", "few", "calibration_error", "feature_norm_mean", "own_angle_mean"),
    *("validation_balanced_accuracy", "seconds"),
)


@renamed_fields(pictures="images")
@dataclass(frozen=True)
class Metrics:
    """Measured on one split. Fractions are in [0, 1], angles in radians; None where nothing could be measured.

    ``accuracy`` is the fraction of images classified correctly; ``many``, ``medium`` and ``few`` are the mean of their
    classes' accuracies (as ImageNet-LT reports them), over classes that have images in the split, and
    ``balanced_accuracy`` that of all of them. ``calibration_error`` is the expected one of the softmax of the logits in
    15 bins (Guo et al., On calibration of modern neural networks, ICML 2017, eq. 3)."""

    images: int  # in the split
    loss: float | None  # cross-entropy of the logits without margin
    accuracy: float | None
    balanced_accuracy: float | None
    many: float | None
    medium: float | None
    few: float | None
    calibration_error: float | None
    per_class: tuple[float | None, ...]
    feature_norm_mean: float | None
    own_angle_mean: float | None  # between a feature and the prototype of its target class


_BINS = 15


def target_angles(features: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    """Angle (N,) in radians between each feature (N, D) and its target prototype, exact near 0 and pi.

    Of prototypes (C, K, D) the nearest of the target's K counts.
    """
    w = F.normalize(prototypes[labels].float(), dim=-1)
    x = F.normalize(features, dim=1).view(-1, *[1] * (w.dim() - 2), w.shape[-1])
    angles = 2 * torch.atan2((x - w).norm(dim=-1), (x + w).norm(dim=-1))
    return angles if w.dim() == 2 else angles.amin(1)


class MetricsAccumulator:
    """Collects batches of one split; ``result`` is the metrics of all of them."""

    def __init__(self, class_counts: Sequence[int], thresholds: Thresholds) -> None:
        self._class_counts, self._thresholds = class_counts, thresholds
        self._correct = np.zeros(len(class_counts), dtype=np.int64)
        self._total = np.zeros(len(class_counts), dtype=np.int64)
        self._sums = np.zeros(3)  # loss, feature length, angle to the target prototype
        self._bins = np.zeros(_BINS)  # of the confidence: sum of (correct - confidence) in each

    def add(
        self, labels: Tensor, predicted: Tensor, confidence: Tensor, losses: Tensor, norms: Tensor, angles: Tensor
    ) -> None:
        """Count one batch: six tensors of shape (B,)."""
        truth = labels.cpu().numpy()
        right = predicted.cpu().numpy() == truth
        correct = truth[right]
        sure = confidence.double().cpu().numpy()
        bins = np.clip(np.ceil(np.nan_to_num(sure) * _BINS).astype(np.int64) - 1, 0, _BINS - 1)
        self._bins += np.bincount(bins, right - sure, minlength=_BINS)
        self._total += np.bincount(truth, minlength=len(self._total))
        self._correct += np.bincount(correct, minlength=len(self._total))
        self._sums += [float(values.double().sum()) for values in (losses, norms, angles)]

    def result(self) -> Metrics:
        """The metrics of everything added so far."""
        count = int(self._total.sum())
        present = self._total > 0
        per_class = np.divide(self._correct, self._total, out=np.full(len(present), np.nan), where=present)
        loss, norm, angle = (float(total) / count if count else None for total in self._sums)
        return Metrics(
            images=count,
            loss=loss,
            accuracy=float(self._correct.sum()) / count if count else None,
            balanced_accuracy=float(per_class[present].mean()) if count else None,
            **self._thresholds.means(per_class, self._class_counts),
            calibration_error=float(np.abs(self._bins).sum()) / count if count else None,
            per_class=tuple(float(value) if there else None for value, there in zip(per_class, present, strict=True)),
            feature_norm_mean=norm,
            own_angle_mean=angle,
        )


def percent(fraction: float | None) -> str:
    """A fraction as '93.4', None as a dash."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def number(value: float | None) -> str:
    """A number with three decimals, None as a dash."""
    return "–" if value is None else f"{value:.3f}"
