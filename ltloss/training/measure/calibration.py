"""How far the probability of a prediction can be believed: the calibration curve and its error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BINS = 15


@dataclass(frozen=True)
class CalibrationBin:
    """The images whose prediction has a probability in (low, high]; 0 itself belongs to the first bin.

    ``confidence`` is the mean of these probabilities and ``accuracy`` the fraction of correct predictions, None where
    there is no such image, or where a probability is NaN."""

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


class Calibration:
    """Collects probabilities of predictions in 15 bins of equal width.

    Source: Guo et al., On calibration of modern neural networks, ICML 2017: the curve is the reliability diagram of
    section 2, the error that of eq. 3. A probability that is NaN is counted in the first bin, which then has no curve.
    """

    def __init__(self) -> None:
        self._images = np.zeros(_BINS, dtype=np.int64)
        self._correct = np.zeros(_BINS, dtype=np.int64)
        self._confidence = np.zeros(_BINS)  # sums

    def add(self, confidence: np.ndarray, correct: np.ndarray) -> None:
        """Count predictions with the probabilities ``confidence`` (B,) float64, ``correct`` (B,) bool or not."""
        bins = np.clip(np.ceil(np.nan_to_num(confidence) * _BINS).astype(np.int64) - 1, 0, _BINS - 1)
        self._images += np.bincount(bins, minlength=_BINS)
        self._correct += np.bincount(bins[correct], minlength=_BINS)
        self._confidence += np.bincount(bins, confidence, minlength=_BINS)

    def error(self) -> float | None:
        """Expected calibration error, Σ over bins of |number correct − sum of confidence| / N; None of no images."""
        count = self._images.sum()
        return float(np.abs(self._correct - self._confidence).sum() / count) if count else None

    def bins(self) -> tuple[CalibrationBin, ...]:
        """The curve, from the least certain predictions to the most certain."""
        found = []
        for b, (images, correct, confidence) in enumerate(
            zip(self._images.tolist(), self._correct.tolist(), self._confidence.tolist(), strict=True)
        ):
            known = images > 0 and np.isfinite(confidence)
            mean, accuracy = (confidence / images, correct / images) if known else (None, None)
            found.append(CalibrationBin(b / _BINS, (b + 1) / _BINS, images, mean, accuracy))
        return tuple(found)
