"""How reliable the probability of a prediction is: the calibration curve and the calibration error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ltloss._calibration import BINS, binned, calibration_error


@dataclass(frozen=True)
class CalibrationBin:
    """The images whose prediction has a probability in (low, high]; the first bin also takes 0 and NaN."""

    low: float
    high: float
    images: int
    confidence: float | None  # the mean of the probabilities; None where there is no image, or a NaN
    accuracy: float | None  # the fraction of correct predictions; None likewise


class Calibration:
    """Collects predictions by their probability, in 15 bins of equal width.

    A probability that is NaN counts in the first bin, which then has no point on the curve.

    Source: Guo et al., On calibration of modern neural networks, ICML 2017: the curve is the reliability diagram of
    section 2, the error that of eq. 3.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(3, BINS, dtype=torch.float64)

    def add(self, confidence: np.ndarray, correct: np.ndarray) -> None:
        """Add predictions with probabilities ``confidence`` (B,) float64; ``correct`` (B,) bool: which are right."""
        self._sums += binned(torch.from_numpy(confidence), torch.from_numpy(correct))

    def error(self) -> float | None:
        """Expected calibration error, Σ over bins of |number correct − sum of confidence| / N; None without images."""
        return calibration_error(self._sums)

    def bins(self) -> tuple[CalibrationBin, ...]:
        """The curve, from the least certain predictions to the most certain."""
        found = []
        for b, (images, correct, confidence) in enumerate(self._sums.t().tolist()):
            known = images > 0 and math.isfinite(confidence)
            mean, accuracy = (confidence / images, correct / images) if known else (None, None)
            found.append(CalibrationBin(b / BINS, (b + 1) / BINS, int(images), mean, accuracy))
        return tuple(found)
