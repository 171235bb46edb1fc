"""What a classifier says of a set of images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Predictions"]


@dataclass(frozen=True)
class Predictions:
    """The K best classes of N images, best first.

    Attributes:
        index: (N, K) int64 classes in order of the cosine between feature and prototype.
        probability: (N, K) float64, of the softmax over all classes.
        angle: (N,) float64 degrees between the feature and the prototype of the best class, in [0, 180].
    """

    index: np.ndarray
    probability: np.ndarray
    angle: np.ndarray
