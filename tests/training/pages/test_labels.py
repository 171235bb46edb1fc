"""No text of a figure lies on another, and none is cut off, also where there are many labels and long ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ltloss.training.measure.calibration import Calibration
from ltloss.training.measure.confusion import ConfusionMatrix
from ltloss.training.measure.feature_map import FeatureMap
from ltloss.training.pages import classifier_plots, plots

NAMES = [f"{'a long name of a class ' * 2}{number}" for number in range(21)]


def confusion(side: int, most: int) -> plots.Plot:
    counts = np.random.default_rng(0).integers(0, most, (side + 1, side + 1))
    matrix = ConfusionMatrix(tuple(range(side)), True, tuple(map(tuple, counts.tolist())))
    return classifier_plots.confusion("f", matrix, NAMES)


def calibration() -> plots.Plot:
    found, draw = Calibration(), np.random.default_rng(0)
    sure = draw.random(500)
    found.add(sure, draw.random(500) < sure)
    return classifier_plots.calibration("f", found.bins())


def feature_map() -> plots.Plot:
    places = np.random.default_rng(0).normal(size=(60, 2))
    found = FeatureMap("PCA", 0.5, places, np.arange(60) % 9, places[:9], np.arange(9))
    return classifier_plots.map_of_features("f", found, range(6), NAMES)


def by_count(most: int) -> plots.Plot:
    counts = np.unique(np.geomspace(1, most, 40).astype(np.int64))
    return plots.accuracy_by_count("f", counts, np.linspace(0, 1, len(counts)))


DRAWN: dict[str, Callable[[], plots.Plot]] = {
    "two confusions": lambda: confusion(1, 100_000),
    "21 confusions": lambda: confusion(20, 2_000),
    "calibration": calibration,
    "map": feature_map,
    "curve": lambda: plots.learning_curve(
        "f", "C", [*range(1, 1001)], {"training": [*np.geomspace(9, 1e-3, 1000)], "test": [9.0] * 1000}, axis="loss"
    ),
    **{f"counts to {most}": lambda most=most: by_count(most) for most in (3, 40, 5_000, 2_000_000)},
    "groups": lambda: plots.groups("f", [(f"{name} (more than 1000)", 0.5) for name in ("many", "medium", "few")]),
    "means": lambda: plots.means_with_spread(
        "f", "M", [(name, 50.0, 0.01) for name in NAMES[:15]], axis="accuracy (%)"
    ),
    "histogram": lambda: plots.histogram("f", "H", np.geomspace(1e-6, 1e6, 90), axis="length", what="features"),
}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that are put out."""
    found, markup = [], plots.markup

    def kept(figure: Any) -> str:
        found.append(figure)
        return markup(figure)

    monkeypatch.setattr(plots, "markup", kept)
    return found


def boxes(figure: Any) -> list[tuple[str, Any]]:
    """Each text that shows, with the box around it in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    hidden = set()  # labels of ticks beyond the ends of an axis
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        shown = axis._update_ticks()
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        hidden |= {label for tick in ticks if tick not in shown for label in (tick.label1, tick.label2)}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    renderer = canvas.get_renderer()
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text not in hidden]


def on_each_other(found: list[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of texts that share more than a pixel."""
    shared = (
        (a, b, min(x.x1, y.x1) - max(x.x0, y.x0), min(x.y1, y.y1) - max(x.y0, y.y0))
        for (a, x), (b, y) in itertools.combinations(found, 2)
    )
    return [(a, b) for a, b, width, height in shared if min(width, height) > 1]


def cut_off(found: list[tuple[str, Any]], figure: Any) -> list[str]:
    """Texts that leave the figure by more than a pixel."""
    width, height = figure.get_size_inches() * figure.dpi
    return [t for t, box in found if min(box.x0, box.y0, width - box.x1, height - box.y1) < -1]


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_no_label_lies_on_another(name: str, figures: list[Any]) -> None:
    DRAWN[name]()
    (figure,) = figures
    found = boxes(figure)
    assert len(found) > 5
    assert on_each_other(found) == []
    assert cut_off(found, figure) == []


def test_labels_on_each_other_are_found() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1))
    for x, word in ((0.1, "first"), (0.12, "second"), (0.7, "third"), (0.99, "fourth")):
        figure.text(x, 0.5, word)
    found = boxes(figure)
    assert on_each_other(found) == [("first", "second")]
    assert cut_off(found, figure) == ["fourth"]
