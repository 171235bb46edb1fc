from __future__ import annotations

import re

import numpy as np
import pytest
from helpers.small_run import HOSTILE

from ltloss.training.measure.calibration import Calibration
from ltloss.training.measure.confusion import ConfusionMatrix
from ltloss.training.measure.feature_map import FeatureMap
from ltloss.training.pages import classifier_plots
from ltloss.training.pages.plots import Plot

pytestmark = pytest.mark.slow


def words(plot: Plot) -> list[str]:
    """The texts in a figure."""
    return re.findall(r">([^<>]+)</(?:text|tspan)>", plot.svg)


def test_the_matrix_has_its_counts_and_the_others() -> None:
    matrix = ConfusionMatrix((2, 0), True, ((7, 0, 1), (23, 5, 0), (0, 0, 99)))
    plot = classifier_plots.confusion("c", matrix, ("", "cat", "dog"))
    assert {"7", "1", "23", "5", "99"} <= set(words(plot))
    assert "0" not in words(plot)
    assert words(plot).count("all others") == 2
    assert "of 2 classes and all others. The most: 23 images of (no name) taken for dog." in plot.alt


@pytest.mark.parametrize("counts", [((3,),), ((0,),)])
def test_a_matrix_without_a_wrong_prediction(counts: tuple[tuple[int, ...], ...]) -> None:
    plot = classifier_plots.confusion("c", ConfusionMatrix((0,), False, counts), ("only",))
    assert plot.alt == "Confusion matrix of 1 classes."


def test_any_name_is_one_short_line_and_no_mathematics(recwarn: pytest.WarningsRecorder) -> None:
    names = (*HOSTILE, "$x$ costs $5", "\x00\ud800", "a" * 300)
    side = len(names)
    matrix = ConfusionMatrix(tuple(range(side)), False, tuple(map(tuple, np.eye(side, dtype=int).tolist())))
    plot = classifier_plots.confusion("c", matrix, names)
    assert not recwarn.list, [str(warning.message) for warning in recwarn]
    assert {"$x$ costs $5", "(no name)", "\ufffd\ufffd", "né, 猫 zwei", "a" * 19 + "…"} <= set(words(plot))
    assert "<script" not in plot.svg


def test_the_calibration_curve_says_each_bin() -> None:
    found = Calibration()
    found.add(np.array([0.3, 0.31, 0.9, np.nan]), np.array([True, False, True, True]))
    plot = classifier_plots.calibration("c", found.bins())
    assert plot.alt.endswith("30%: 50% right; 90%: 100% right.")
    assert "nan" not in plot.svg.lower()


@pytest.mark.parametrize("marked", [(), (0,), (3, 1, 0, 2, 5, 4)])
def test_the_map_names_the_marked_classes(marked: tuple[int, ...]) -> None:
    places = np.random.default_rng(0).normal(size=(40, 2))
    found = FeatureMap("PCA", 0.5, places, np.arange(40) % 9, places[:9], np.arange(9))
    plot = classifier_plots.map_of_features("m", found, marked, [f"class {c}" for c in range(9)])
    assert "PCA, 50% of the variance" in words(plot)
    assert {word for word in words(plot) if word.startswith("class")} == {f"class {c}" for c in marked}
    assert "40 images and 9 prototypes" in plot.alt


def test_the_map_names_classes_that_begin_with_an_underscore() -> None:
    places = np.random.default_rng(0).normal(size=(40, 2))
    found = FeatureMap("PCA", 0.5, places, np.arange(40) % 3, places[:3], np.arange(3))
    plot = classifier_plots.map_of_features("m", found, (1, 2, 0), ["_background_", "cat", "$x$"])
    assert words(plot)[-3:] == ["cat", "$x$", "_background_"]
