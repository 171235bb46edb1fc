"""The validation part: its rows, the accuracy on it, the temperature that is fitted on it, the calibration error."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ltloss import _calibration
from ltloss._estimator.heads import Classifier
from ltloss._estimator.space import Batches, Part
from ltloss.numerics import spans

__all__ = ["block_rows", "calibration_error", "share_right", "temperature", "validation_mask"]

_BLOCK = 1 << 22  # numbers in a block of logits or features
_ROWS = 4096  # in a block without logits: fewer take longer, more gain nothing
_MOST = 20_000  # rows of a validation part, about
_MOST_LOGITS = 1 << 27  # logits that the temperature is fitted on
_ROUNDS = 12  # Newton steps at most


def block_rows(classifier: Classifier, *, dense: bool = True) -> int:
    """How many rows make a block of features and dense logits; more where no ``dense`` logits bound them."""
    rows = max(1, _BLOCK // max(classifier.prototypes.shape))
    return rows if dense else max(rows, min(_ROWS, _BLOCK // classifier.prototypes.shape[1]))


def validation_mask(labels: Tensor, classes: int, fraction: float, generator: torch.Generator) -> Tensor:
    """A mask (N,), True for the rows held out: ``fraction`` of each class, rounded up or down at random.

    A class always keeps one row. At least one row is held out.
    """
    counts = torch.bincount(labels, minlength=classes)
    most = int(counts.max())
    if most < 2:
        raise ValueError(
            "a validation part needs a class with two samples; every class has one. Choose a loss and one scale with "
            "validation_fraction=None, which needs no validation part"
        )
    share = min(fraction, _MOST / len(labels))
    held = (counts * share + torch.rand(classes, generator=generator)).floor().long()
    held = torch.minimum(held, counts - 1).clamp(min=0)
    if not held.any():
        held[counts.argmax()] = 1
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(labels)) - first[labels[by_class]]
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[by_class] = rank < held[labels[by_class]]
    return mask


def _blocks(batches: Batches, part: Part, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Features, labels and weights of a part in blocks, on the device."""
    for start, stop in spans(len(part.rows), rows):
        block = part.take(slice(start, stop))
        yield batches[block.rows], block.labels.to(batches.device), block.weights.to(batches.device)


def share_right(classifier: Classifier, batches: Batches, part: Part) -> float:
    """Weighted top-1 accuracy on a part."""
    right = 0.0
    for z, labels, weights in _blocks(batches, part, _ROWS):
        right += float(((classifier.best(z)[:, 0] == labels) * weights).sum())
    return right / float(part.weights.sum())


def temperature(classifier: Classifier, offset: Tensor, batches: Batches, part: Part) -> float:
    """The temperature T that minimises the weighted negative log-likelihood of softmax(logits/T + offset), offset (C,).

    Newton's method in 1/T, in which the log-likelihood is concave: its slope is Σ w·(l_y − E[l]), its curvature
    −Σ w·Var[l]. A large part is cut to its first rows. T lies in [0.02, 50].

    Source: Guo et al., On calibration of modern neural networks, ICML 2017, section 4.2.
    """
    classes = len(classifier.intercept)
    part = part.take(slice(max(1, _MOST_LOGITS // classes)))
    inverse = 1.0
    for _ in range(_ROUNDS):
        slope = curvature = 0.0
        for z, labels, weights in _blocks(batches, part, block_rows(classifier)):
            logits = classifier.logits(z)
            chance = torch.softmax(logits * inverse + offset, dim=1)
            mean = (chance * logits).sum(1)
            target = logits.gather(1, labels[:, None])[:, 0]
            slope += float((weights * (target - mean)).sum())
            curvature += float((weights * (chance * (logits - mean[:, None]).square()).sum(1)).sum())
        if curvature <= 0.0:
            break
        former, inverse = inverse, min(max(inverse + slope / curvature, inverse / 2), inverse * 2)
        if abs(inverse - former) < 1e-3 * inverse:
            break
    return 1.0 / min(max(inverse, 0.02), 50.0)


def calibration_error(classifier: Classifier, batches: Batches, part: Part) -> float | None:
    """Expected calibration error of the largest probabilities, weighted."""
    sums = torch.zeros(3, _calibration.BINS, dtype=torch.float64)
    for z, labels, weights in _blocks(batches, part, block_rows(classifier)):
        confidence, found = torch.softmax(classifier.logits(z), dim=1).max(1)
        sums += _calibration.binned(confidence, found == labels, weights)
    return _calibration.calibration_error(sums)
