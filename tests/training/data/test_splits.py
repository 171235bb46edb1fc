from __future__ import annotations

import numpy as np
import pytest
from helpers.refusals import refused

from ltloss.errors import UserError
from ltloss.training.data.splits import keep_per_class, long_tailed_counts, long_tailed_subset, stratified_split


@pytest.mark.parametrize(
    ("classes", "per_class", "imbalance", "total", "smallest"),
    [
        pytest.param(10, 6000, 100, 14_886, 60, id="Fashion-MNIST"),
        pytest.param(1623, 15, 15, 7_626, 1, id="Omniglot"),
        pytest.param(10, 5000, 100, 12_406, 50, id="CIFAR-10"),
        pytest.param(100, 500, 100, 10_847, 5, id="CIFAR-100"),
    ],
)
def test_sizes_are_those_of_the_literature(
    classes: int, per_class: int, imbalance: float, total: int, smallest: int
) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), per_class))
    kept = labels[long_tailed_subset(labels, imbalance, seed=0)]
    counts = np.bincount(kept, minlength=classes)
    assert counts.sum() == total
    assert counts[0] == per_class
    assert counts[-1] == smallest
    assert (np.diff(counts) <= 0).all()


def test_unbalanced_classes_are_ranked_by_size_and_never_exceeded() -> None:
    available = np.array([4, 100, 30])
    # Ranks: class 1, class 2, class 0. 100 * 4 ** (-1/2) = 50 > 30 and 100 / 4 = 25 > 4 are cut to what there is.
    assert long_tailed_counts(available, 4).tolist() == [4, 100, 30]
    assert long_tailed_counts(available, 50).tolist() == [2, 100, 14]


def test_subset_depends_on_the_seed_alone() -> None:
    labels = np.repeat(np.arange(3), 50)
    first, again, other = (long_tailed_subset(labels, 10, seed=seed) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()
    assert len(set(first.tolist())) == len(first)


def test_imbalance_one_keeps_everything() -> None:
    labels = np.array([0, 1, 1, 2])
    assert long_tailed_subset(labels, 1, seed=0).tolist() == [0, 1, 2, 3]


def test_imbalance_that_empties_a_class_says_the_largest_possible() -> None:
    with refused("15", "16", error=UserError):
        long_tailed_counts(np.full(100, 15), 16)


def test_keep_per_class_takes_every_sample_of_a_class_equally_often() -> None:
    labels = np.repeat([0, 1], 10)
    taken = np.zeros(20)
    for seed in range(300):
        taken[keep_per_class(labels, np.array([3, 10]), seed, "test")] += 1
    assert taken[:10].sum() == 900
    assert taken[:10].min() > 60
    assert taken[:10].max() < 125
    assert (taken[10:] == 300).all()


def test_split_is_stratified_disjoint_and_complete() -> None:
    labels = np.array([0] * 10 + [1] * 5 + [2] * 1)
    train, test = stratified_split(labels, 0.2, seed=3)
    assert sorted([*train, *test]) == list(range(16))
    assert np.bincount(labels[test], minlength=3).tolist() == [2, 1, 0]
