"""The feature space: features centred, and whitened by their covariance within classes, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ltloss.numerics import spans

__all__ = ["WIDEST", "Batches", "Part", "Space", "class_means", "of_class_means", "rows_of", "sent_to"]

Array = np.ndarray[Any, Any]

_BLOCK = 1 << 20  # numbers of X that are converted at a time
WIDEST = 4096  # features up to which the whitening is a matrix; more are only divided by their standard deviations
_LEAST_SHRINKAGE = 0.01
_LEAST_VARIANCE = 1e-3  # least variance of a feature within classes, as a fraction of its total variance


class Part(NamedTuple):
    """Some rows of X: their indices, labels and weights, (n,) each, on the CPU."""

    rows: Tensor
    labels: Tensor
    weights: Tensor

    def take(self, chosen: Tensor | slice) -> Part:
        """The rows that a mask, indices or a slice select."""
        return Part(*(values[chosen] for values in self))

    def mass(self, classes: int) -> Tensor:
        """Summed weight (C,) of each class."""
        return torch.zeros(classes).index_add_(0, self.labels, self.weights)


class Space(NamedTuple):
    """x -> (x − mean)·whitening. The covariance within classes becomes I/D, so that rows have a length of about 1.

    ``mean`` is (D,). ``whitening`` is upper triangular (D, D), or a diagonal (D,) for more than 4096 features.
    """

    mean: Tensor
    whitening: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Map rows (n, D)."""
        rows = rows - self.mean
        return rows * self.whitening if self.whitening.dim() == 1 else rows @ self.whitening

    def to(self, device: torch.device) -> Space:
        """The same on that device."""
        return Space(self.mean.to(device), self.whitening.to(device))


def rows_of(X: Array, index: Tensor | slice) -> Tensor:
    """A float32 copy of rows of X, which may be read-only, memory-mapped, or of another floating dtype."""
    with np.errstate(over="ignore"):
        rows = np.array(X[index if isinstance(index, slice) else index.numpy()], dtype=np.float32)
    if X.dtype == np.float64 and not np.isfinite(rows).all():
        raise ValueError(f"X must lie in the range of float32, up to 3.4e38; got {np.abs(X).max():g}")
    return torch.from_numpy(rows)


def sent_to(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor of the CPU on the device. The host does not wait for the steps that a GPU has yet to do.

    For that the copy must start from pinned memory, which PyTorch keeps until the copy is done.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class Batches:
    """Rows of X mapped to a space on demand, so that X is never copied whole."""

    X: Array
    space: Space
    device: torch.device

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """The mapped rows at these indices, (n, D) on the device."""
        return self.space(sent_to(self.device, rows_of(self.X, index)))

    def blocks(self, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """All of X in blocks of at most ``rows`` rows, each with its slice."""
        for start, stop in spans(len(self.X), rows):
            yield slice(start, stop), self[start:stop]


def _blocks(X: Array, part: Part) -> Iterator[tuple[Tensor, Part]]:
    for start, stop in spans(len(part.rows), max(1, _BLOCK // X.shape[1])):
        block = part.take(slice(start, stop))
        yield rows_of(X, block.rows), block


def class_means(X: Array, part: Part, classes: int, space: Space) -> Tensor:
    """Weighted mean (C, D) of each class in a space; 0 for a class without rows."""
    sums = torch.zeros(classes, X.shape[1])
    for rows, block in _blocks(X, part):
        sums.index_add_(0, block.labels, space(rows) * block.weights[:, None])
    return sums.div_(part.mass(classes).clamp(min=torch.finfo(sums.dtype).tiny)[:, None])


def of_class_means(X: Array, part: Part, classes: int) -> tuple[Space, Tensor]:
    """The space of these rows, and the weighted mean (C, D) of each class in it.

    S is the covariance within the classes and d its diagonal. The whitening W is that of the shrunken covariance
    (1 − a)·S + a·diag(d), whose inverse is D·W·Wᵀ. The shrinkage is a = D/(D + n − C), at least 0.01, because few
    samples per class say little about correlations.
    """
    width, total = X.shape[1], part.weights.sum()
    mean = torch.zeros(width, dtype=torch.float64)
    for rows, block in _blocks(X, part):
        mean += (block.weights @ rows).double()
    shift = Space((mean / total).float(), torch.ones(width))
    means = class_means(X, part, classes, shift)
    turned = width <= WIDEST
    within = torch.zeros((width, width) if turned else (width,), dtype=torch.float64)
    variance = torch.zeros(width, dtype=torch.float64)
    for rows, block in _blocks(X, part):
        rows = shift(rows)
        variance += (block.weights @ rows.square()).double()
        rows -= means[block.labels]
        weighted = rows * block.weights[:, None]
        within += (rows.T @ weighted if turned else (rows * weighted).sum(0)).double()
    if not torch.isfinite(variance).all():
        raise ValueError("the features are too large: the sum of their squares leaves the range of float32")
    freedom = max(0, len(part.rows) - int((part.mass(classes) > 0).sum()))
    whitening = _whitening(within / total, variance / total, max(_LEAST_SHRINKAGE, width / (width + freedom)))
    space = Space(shift.mean, whitening.float().contiguous())
    return space, space._replace(mean=torch.zeros(width))(means)


def _whitening(within: Tensor, variance: Tensor, shrinkage: float) -> Tensor:
    """W with D·W·Wᵀ = the inverse of the shrunken covariance; the diagonal of W (D,) where ``within`` is a diagonal."""
    diagonal = torch.maximum(within.diagonal() if within.dim() == 2 else within, _LEAST_VARIANCE * variance)
    deviation = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
    scale: Tensor = 1 / (deviation * len(deviation) ** 0.5)
    if within.dim() == 1:
        return scale
    correlation = (1 - shrinkage) * within / torch.outer(deviation, deviation)
    correlation.diagonal().fill_(1.0)
    lower = torch.linalg.cholesky(correlation)
    identity = torch.eye(len(scale), dtype=torch.float64)
    inverse: Tensor = torch.linalg.solve_triangular(lower.T, identity, upper=True)
    return scale[:, None] * inverse
