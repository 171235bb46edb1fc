"""A two-dimensional map of what the loss sees: features of images, and prototypes of classes."""

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

_SAMPLE = 2000  # images spread over the whole split
_PER_CLASS = 60  # more images of each marked class
_FEWEST = 16  # points for which "auto" takes UMAP


@dataclass(frozen=True)
class FeatureMap:
    """Places of images and prototypes on the map.

    Attributes:
        method: "UMAP" or "PCA".
        variance: for PCA, the fraction of the images' variance along the two axes; else None.
        images, labels: places (N, 2) float64 and labels (N,) of the images.
        prototypes, prototype_labels: places (P, 2) float64 and classes (P,) of the prototypes.
    """

    method: str
    variance: float | None
    images: np.ndarray
    labels: np.ndarray
    prototypes: np.ndarray
    prototype_labels: np.ndarray

    def to_json(self, class_names: Sequence[str]) -> str:
        """The map as JSON: a list [x, y, class] for each image and each prototype."""

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
    """The value to five digits, more than a map can show."""
    return float(f"{value:.5g}")


def sample_for_map(labels: np.ndarray, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices (M,) of images for the map, and a mask (M,) of those in the even sample.

    The even sample is up to 2000 images spread over all ``labels`` (N,). The others are the first 60 of each of
    ``classes``.
    """
    even = np.unique(np.linspace(0, len(labels) - 1, min(_SAMPLE, len(labels))).astype(np.int64))
    numbers = np.unique(np.concatenate([even, *(np.flatnonzero(labels == c)[:_PER_CLASS] for c in classes)]))
    return numbers, np.isin(numbers, even)


def seen_by_the_loss(head: Any, features: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D) and prototypes (P, D) as points of one space, and the classes (P,) of the prototypes.

    Features are unit vectors if the head normalises them, as a cosine classifier does; else they keep their length. A
    prototype is drawn in its direction, at the mean length of the features. Each sub-centre of (C, K, D) is a point.
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
    """The map of points (N, D) with labels (N,), and of prototypes (P, D) with their classes (P,); deterministic.

    PCA takes the two directions of largest variance of the points, each with the sign that makes its largest entry
    positive, and projects points and prototypes on them. UMAP places points and prototypes together, with 15 neighbours
    and a fixed seed. ``method`` is "pca", "umap" or "auto", which takes UMAP where the package ``umap-learn`` is
    installed and there are at least 16 points. Points and prototypes that are not finite are left out.

    Source: McInnes, Healy and Melville, UMAP: uniform manifold approximation and projection, 2018.

    Raises:
        UserError: ``method`` is "umap", which is not installed.
        ValueError: no point is finite, or there is none.

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
        raise ValueError(f"points must have a row of finite numbers; got {len(known)} rows without one")
    if method == "umap" or (method == "auto" and len(points) + len(prototypes) >= _FEWEST):
        together = _umap(np.concatenate([points, prototypes]), required=method == "umap")
        if together is not None:
            images, centers = together[: len(points)], together[len(points) :]
            return FeatureMap("UMAP", None, images, labels, centers, prototype_labels)
    middle, axes, share = _principal_axes(points)
    images, centers = (points - middle) @ axes, (prototypes - middle) @ axes
    return FeatureMap("PCA", share, images, labels, centers, prototype_labels)


def _principal_axes(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The mean (D,), two axes (D, 2), the second 0 if D is 1, and the fraction of the variance along them."""
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
