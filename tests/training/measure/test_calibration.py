from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from ltloss.training.measure.calibration import Calibration


def test_the_error_is_the_weighted_gap_of_15_bins() -> None:
    found = Calibration()
    found.add(np.array([0.05, 0.06, 0.07, 0.55, 0.58, 1.0]), np.array([0, 1, 1, 1, 0, 1], dtype=bool))
    gaps = abs(1 - 0.05 - 0.06) + abs(1 - 0.07) + abs(1 - 0.55 - 0.58) + abs(1 - 1.0)
    assert found.error() == pytest.approx(gaps / 6)


def test_the_curve_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.3, 1, 500)
    correct = generator.random(500) < confidence**2
    found = Calibration()
    for part in (slice(0, 137), slice(137, None)):
        found.add(confidence[part], correct[part])
    bins = [one for one in found.bins() if one.images]
    accuracy, mean = calibration_curve(correct, confidence, n_bins=15)  # which leaves empty bins out
    assert [one.accuracy for one in bins] == pytest.approx(accuracy)
    assert [one.confidence for one in bins] == pytest.approx(mean)
    assert all(one.low < one.confidence <= one.high for one in bins if one.confidence is not None)
    assert sum(one.images for one in bins) == 500


def test_an_edge_belongs_to_the_bin_below_and_0_to_the_first() -> None:
    found = Calibration()
    found.add(np.array([0.0, 0.2, 0.25, 1.0]), np.array([False, True, True, True]))
    assert [b for b, one in enumerate(found.bins()) if one.images] == [0, 2, 3, 14]
    assert found.bins()[2].high == pytest.approx(0.2)


def test_nothing_and_nan_have_no_curve() -> None:
    assert Calibration().error() is None
    assert {(one.images, one.confidence, one.accuracy) for one in Calibration().bins()} == {(0, None, None)}
    found = Calibration()
    found.add(np.array([math.nan, 0.9]), np.array([True, True]))
    assert found.error() is not None
    assert math.isnan(found.error() or 0.0)
    assert (found.bins()[0].images, found.bins()[0].confidence, found.bins()[0].accuracy) == (1, None, None)
    assert found.bins()[13].accuracy == 1.0
