"""A map in two dimensions of what the loss sees: features of images, and prototypes of classes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltloss.errors import UserError

_SAMPLE = 2000  # images over the whole split,
_PER_CLASS = 60  # and so many of each class that is marked
_FEWEST = 16  # points that UMAP is given


@dataclass(frozen=True)
class FeatureMap:
    """Where images and prototypes lie on the map.

    Attributes:
        method: "UMAP" or "PCA".
        variance: the share of the images' variance that the two axes show, of PCA.
        images: (N, 2) float64, with labels (N,).
        prototypes: (P, 2) float64, with their classes (P,).
    """

    method: str
    variance: float | None
    images: np.ndarray
    labels: np.ndarray
    prototypes: np.ndarray
    prototype_labels: np.ndarray

    def to_json(self, class_names: Sequence[str]) -> str:
        """For machine reading: a list [x, y, class] for each image and each prototype."""

        def points(places: np.ndarray, labels: np.ndarray) -> list[list[Any]]:
            return [[*map(_short, place), class_names[c]] for place, c in zip(places.tolist(), labels, strict=True)]

        values = {
            "method": self.method,
            "variance": self.variance,
            "images": points(self.images, self.labels),
            "prototypes": points(self.prototypes, self.prototype_labels),
        }
        return json.dumps(values)


def _short(value: float) -> float:
    """Five digits, which is more than a map can show."""
    return float(f"{value:.5g}")


def sample_for_map(labels: np.ndarray, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted numbers (M,) of images, and which of these (M,) are spread evenly over the ``labels`` (N,) of all.

    Those are at most 2000; the others are the first 60 of each of ``classes``.
    """
    even = np.unique(np.linspace(0, len(labels) - 1, min(_SAMPLE, len(labels))).astype(np.int64))
    numbers = np.unique(np.concatenate([even, *(np.flatnonzero(labels == c)[:_PER_CLASS] for c in classes)]))
    return numbers, np.isin(numbers, even)


def seen_by_the_loss(head: Any, features: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D) and prototypes (P, D) as points of one space, with the classes (P,) of the prototypes.

    The loss of a cosine classifier divides features by their length, so they are unit vectors here; where it keeps the
    length, as a linear layer does, they stay as they are. A prototype is a direction, drawn at the mean length of the
    features. Of sub-centres (C, K, D) each is a point.
    """
    points = features.double()
    if getattr(head, "normalize_features", False):
        points = F.normalize(points, dim=1)
    directions = F.normalize(head.weight.detach().cpu()[list(classes)].double(), dim=-1)
    each = directions.shape[1] if directions.dim() == 3 else 1
    owner = torch.tensor(list(classes)).repeat_interleave(each)
    lengths = points.norm(dim=1)
    length = lengths[lengths.isfinite()].mean()
    return points, directions.reshape(-1, directions.shape[-1]) * length, owner


def feature_map(
    points: np.ndarray, labels: np.ndarray, prototypes: np.ndarray, prototype_labels: np.ndarray, method: str = "auto"
) -> FeatureMap:
    """The map of points (N, D) with labels (N,) and prototypes (P, D) with their classes (P,); the same each time.

    PCA: the two directions of largest variance of the points, each with the sign that makes its largest number
    positive; the prototypes are projected on them. UMAP: of points and prototypes together, 15 neighbours, a fixed
    seed. "auto" takes UMAP where the package ``umap-learn`` is installed. Points with a number that is not finite are
    left out.

    Source: McInnes, Healy and Melville, UMAP: uniform manifold approximation and projection, 2018.

    Raises:
        UserError: ``method`` is "umap" and cannot be had.
        ValueError: no point is finite.

    Example:
        >>> import numpy as np
        >>> from ltloss.training.measure.feature_map import feature_map
        >>> points = np.array([[-3.0, 0, 0], [3, 0, 0], [0, -1, 0], [0, 1, 0], [0, 0, -0.5], [0, 0, 0.5]])
        >>> found = feature_map(points, np.zeros(6, dtype=int), points[:1], np.array([0]), "pca")
        >>> found.images[:4].tolist(), found.prototypes.tolist()
        ([[-3.0, 0.0], [3.0, 0.0], [0.0, -1.0], [0.0, 1.0]], [[-3.0, 0.0]])
        >>> found.method, round(found.variance, 3)
        ('PCA', 0.976)
    """
    known, there = np.isfinite(points).all(1), np.isfinite(prototypes).all(1)
    points, labels, prototypes, prototype_labels = (
        points[known],
        labels[known],
        prototypes[there],
        prototype_labels[there],
    )
    if not len(points):
        raise ValueError("no point is finite")
    if method == "umap" or (method == "auto" and len(points) + len(prototypes) >= _FEWEST):
        together = _umap(np.concatenate([points, prototypes]), required=method == "umap")
        if together is not None:
            images, centers = together[: len(points)], together[len(points) :]
            return FeatureMap("UMAP", None, images, labels, centers, prototype_labels)
    middle, axes, share = _principal_axes(points)
    images, centers = (points - middle) @ axes, (prototypes - middle) @ axes
    return FeatureMap("PCA", share, images, labels, centers, prototype_labels)


def _principal_axes(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The mean (D,), two axes (D, 2), zero where D is 1, and the share of the variance along them."""
    middle = points.mean(0)
    around = points - middle
    values, vectors = np.linalg.eigh(around.T @ around)  # ascending
    axes = vectors[:, ::-1][:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    total = values.sum()
    share = float(values[-2:].sum() / total) if total > 0 else 1.0
    return middle, np.pad(axes, ((0, 0), (0, 2 - axes.shape[1]))), share


def _umap(points: np.ndarray, *, required: bool) -> np.ndarray | None:
    """UMAP of the points (N, D), or None where it is not installed and not required."""
    try:
        from umap import UMAP
    except ImportError as error:
        if not required:
            return None
        raise UserError(f"umap-learn cannot be used ({error}); pip install 'ltloss[map]'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the one thread that a seed needs
        model = UMAP(n_neighbors=min(15, len(points) - 1), random_state=0, n_jobs=1)
        found: np.ndarray = model.fit_transform(points).astype(np.float64)
    return found
