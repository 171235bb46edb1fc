"""The long-tailed training subset of the literature, and other seeded selections of samples."""

from __future__ import annotations

import numpy as np

from ltloss.errors import UserError
from ltloss.training.data.images import Split
from ltloss.training.seeds import numpy_generator

TEST_FRACTION = 0.2


def long_tailed_counts(available: np.ndarray, imbalance: float) -> np.ndarray:
    """Samples to keep per class: n_i = floor(n_max * imbalance ** (-i / (C - 1))) for the class ranked i, (C,) int64.

    Classes are ranked by size, equal ones by index (Cui et al. 2019, Cao et al. 2019 rank balanced data by index); a
    class never keeps more than it has.

    Raises UserError if the rarest class would keep nothing.
    """
    order = np.argsort(-available, kind="stable")
    largest, classes = int(available[order[0]]), len(available)
    # The last exponent is -1, where `largest / imbalance` may be whole: 1e-9 keeps rounding from taking one away.
    exact = largest * imbalance ** (-np.arange(classes) / max(classes - 1, 1))
    counts = np.empty(classes, dtype=np.int64)
    counts[order] = np.minimum(np.floor(exact + 1e-9), available[order])
    if counts.min() < 1:
        raise UserError(
            f"imbalance {imbalance:g} leaves nothing of the rarest of {classes} classes (the largest has {largest}); "
            f"use at most {largest}"
        )
    return counts


def long_tailed_subset(labels: np.ndarray, imbalance: float, seed: int) -> np.ndarray:
    """Sorted indices of a seeded long-tailed subset of labels (N,); imbalance 1 keeps every sample."""
    if imbalance == 1:
        return np.arange(len(labels))
    available = np.bincount(labels)
    return keep_per_class(labels, long_tailed_counts(available, imbalance), seed, "long tail")


def keep_per_class(labels: np.ndarray, counts: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """Sorted indices of at most counts[c] random samples of each class c; ``purpose`` names the random stream."""
    generator = numpy_generator(seed, purpose)
    # A shuffle and a stable sort by class put the samples of each class together, in random order.
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = np.bincount(labels, minlength=len(counts))
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(by_class[rank < counts[labels[by_class]]])


def stratified_split(
    labels: np.ndarray, test_fraction: float, seed: int, purpose: str = "split"
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted (train, test) indices with ``test_fraction`` of each class in test, at least one and at most all but one.

    A class of one sample stays in train. ``purpose`` names the random stream.
    """
    sizes = np.bincount(labels)
    test_counts = np.round(sizes * test_fraction).clip(1, np.maximum(sizes - 1, 1))
    test = keep_per_class(labels, np.where(sizes > 1, test_counts, 0).astype(np.int64), seed, purpose)
    return np.setdiff1d(np.arange(len(labels)), test), test


def split_indices(labels: np.ndarray, split: Split, seed: int) -> np.ndarray:
    """Sorted indices of a split of labels (N,): a seeded 20 % of each class is "test"; "all" is every index."""
    if split == "all":
        return np.arange(len(labels))
    train, test = stratified_split(labels, TEST_FRACTION, seed)
    return train if split == "train" else test
