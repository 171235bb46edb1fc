"""Counts to margins, priors, weights and schedules: by hand, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.refusals import refused

from ltloss.class_balance import (
    DeferredWeights,
    counts_from_labels,
    effective_number_weights,
    inverse_frequency_weights,
    log_prior_from_counts,
    margins_from_counts,
)

FLOAT32 = 1e-6  # the helpers compute in float64 and return float32


def test_counts_from_labels() -> None:
    for labels in ([0, 2, 2], np.array([0, 2, 2]), torch.tensor([[0, 2], [2, -100]]), torch.tensor([0, 2, 2]).int()):
        counts = counts_from_labels(labels, 4)
        assert counts.tolist() == [1, 0, 2, 0]
        assert counts.dtype == torch.int64
    assert counts_from_labels(torch.tensor([255, 1], dtype=torch.uint8), 2, ignore_index=255).tolist() == [0, 1]
    assert counts_from_labels(torch.tensor([], dtype=torch.int64), 2).tolist() == [0, 0]


def test_counts_from_labels_refuses() -> None:
    with refused("labels", "[0, 3)", "5", "1", error=IndexError):
        counts_from_labels([0, 5], 3)
    with refused("labels", "torch.float32", error=TypeError):
        counts_from_labels(torch.tensor([0.0, 1.0]), 3)
    with refused("num_classes", "2.5"):
        counts_from_labels([0, 1], 2.5)  # type: ignore[arg-type]


def test_margins() -> None:
    assert margins_from_counts([10_000, 16, 1], 0.5).tolist() == pytest.approx([0.05, 0.25, 0.5], rel=FLOAT32)
    assert margins_from_counts([4, 9], 1.2, count_exponent=0.5).tolist() == pytest.approx([0.6, 0.4], rel=FLOAT32)
    assert margins_from_counts([4, 9], 0.3, count_exponent=0.0).tolist() == pytest.approx([0.3, 0.3], rel=FLOAT32)
    normalized = margins_from_counts(np.array([10_000, 16, 81]), 0.5, normalize="max")
    assert normalized.tolist() == pytest.approx([0.1, 0.5, 1 / 3], rel=FLOAT32)


def test_log_prior() -> None:
    assert log_prior_from_counts([3, 1]).tolist() == pytest.approx([math.log(0.75), math.log(0.25)], rel=FLOAT32)
    assert log_prior_from_counts([3, 1], tau=0.5).tolist() == pytest.approx(
        [0.5 * math.log(0.75), 0.5 * math.log(0.25)], rel=FLOAT32
    )
    assert not log_prior_from_counts([3, 1], tau=0.0).any()
    assert float(log_prior_from_counts([5, 4, 90]).double().exp().sum()) == pytest.approx(1.0, rel=FLOAT32)


def test_effective_numbers() -> None:
    """(1 − β)/(1 − β^n_c), scaled to mean 1."""
    beta, counts = 0.9, (1, 2, 10)
    raw = [(1 - beta) / (1 - beta**n) for n in counts]
    expected = [value / (sum(raw) / 3) for value in raw]
    assert effective_number_weights(counts, beta=beta).tolist() == pytest.approx(expected, rel=FLOAT32)
    assert effective_number_weights(counts, beta=0.0).tolist() == [1.0, 1.0, 1.0]


def test_effective_numbers_next_to_one_are_inverse_frequencies() -> None:
    """β^n rounds to 1 there; without expm1 the weights would be 0/0."""
    weights = effective_number_weights([1, 4], beta=1 - 1e-15)
    assert weights.tolist() == pytest.approx([1.6, 0.4], rel=1e-5)


def test_inverse_frequencies() -> None:
    assert inverse_frequency_weights([1, 4]).tolist() == pytest.approx([1.6, 0.4], rel=FLOAT32)
    assert inverse_frequency_weights([1, 4], count_exponent=0.5).tolist() == pytest.approx([4 / 3, 2 / 3], rel=FLOAT32)


def test_weights_have_mean_one_for_any_counts() -> None:
    counts = torch.randint(1, 10**6, (1000,))
    for weights in (effective_number_weights(counts), inverse_frequency_weights(counts)):
        assert weights.dtype == torch.float32
        assert float(weights.double().mean()) == pytest.approx(1.0, rel=FLOAT32)
        assert bool((weights > 0).all())


def test_deferred() -> None:
    weights = torch.tensor([1.0, 2.0])
    schedule = DeferredWeights(weights, start_epoch=3)
    assert [schedule(epoch) is None for epoch in range(5)] == [True, True, True, False, False]
    assert schedule(3) is weights
    assert DeferredWeights(weights, start_epoch=0)(0) is weights
    with refused("start_epoch", "0", "-1"):
        DeferredWeights(weights, start_epoch=-1)


HELPERS = [
    margins_from_counts,
    log_prior_from_counts,
    effective_number_weights,
    inverse_frequency_weights,
]


@pytest.mark.parametrize("helper", HELPERS)
class TestEveryHelper:
    def test_refuses_empty_classes(self, helper) -> None:  # type: ignore[no-untyped-def]
        with refused("1", "3", "1"):  # 1 of 3 classes, the first is class 1
            helper([3, 0, 2])

    def test_refuses_what_are_no_counts(self, helper) -> None:  # type: ignore[no-untyped-def]
        for counts, got in (([3, -1], "[3, -1]"), ([math.nan, 1.0], "nan"), ([math.inf, 1.0], "inf")):
            with refused("class_counts", got):
                helper(counts)
        with refused("class_counts", "(C,)", "1"):
            helper(torch.ones(()))
        for shape in ((0,), (2, 2)):
            with refused("class_counts", "(C,)", str(shape)):
                helper(torch.ones(shape))

    def test_takes_lists_arrays_and_tensors(self, helper) -> None:  # type: ignore[no-untyped-def]
        expected = helper([7, 3, 1])
        for counts in ((7, 3, 1), np.array([7, 3, 1]), torch.tensor([7, 3, 1]), torch.tensor([7.0, 3.0, 1.0])):
            assert torch.equal(helper(counts), expected)
        assert expected.shape == (3,)
        assert expected.dtype == torch.float32

    def test_long_vectors_are_abridged(self, helper) -> None:  # type: ignore[no-untyped-def]
        with refused("class_counts", "-1") as caught:
            helper(-torch.ones(100))
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("call", "error", "facts"),
    [
        (lambda: margins_from_counts([1], -0.5), ValueError, ("margin", "0.0", "-0.5")),
        (lambda: margins_from_counts([1], count_exponent=-1.0), ValueError, ("count_exponent", "0.0", "-1.0")),
        (lambda: margins_from_counts([1], "0.5"), TypeError, ("margin", "str", "'0.5'")),
        (lambda: margins_from_counts([1], normalize="mean"), ValueError, ("normalize", "none", "max", "'mean'")),
        (lambda: log_prior_from_counts([1], tau=math.nan), ValueError, ("tau", "nan")),
        (lambda: effective_number_weights([1], beta=1.0), ValueError, ("beta", "1", "1.0")),
        (lambda: effective_number_weights([1], beta=-0.1), ValueError, ("beta", "0.0", "-0.1")),
        (lambda: inverse_frequency_weights([1], count_exponent=None), TypeError, ("count_exponent", "None")),
    ],
)
def test_options_out_of_range(call, error, facts) -> None:  # type: ignore[no-untyped-def]
    with refused(*facts, error=error):
        call()
