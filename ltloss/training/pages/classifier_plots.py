"""The report's figures of a classifier: confusions, calibration, and the map of features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ltloss.training.measure.calibration import CalibrationBin
from ltloss.training.measure.confusion import ConfusionMatrix
from ltloss.training.measure.feature_map import FeatureMap
from ltloss.training.pages.html import showable
from ltloss.training.pages.plots import ACCENT, CONTRAST, DASHES, INK, LINE, Plot, drawing, embed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours of Okabe and Ito's palette, with different shapes.
_MARKS = (("#0072b2", "o"), ("#c2500a", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#e69f00", "v"), ("#56b4e9", "P"))
MARKED = len(_MARKS)  # classes that have a mark of their own on the map


def _label(name: str, width: int = 20) -> str:
    """A class's name for a figure: one short line, with dollar signs escaped for matplotlib."""
    line = " ".join(showable(name).split()) or "(no name)"
    return (line if len(line) <= width else line[: width - 1].rstrip() + "…").replace("$", r"\$")


def confusion(name: str, matrix: ConfusionMatrix, class_names: Sequence[str]) -> Plot:
    """Draw the matrix with true classes as rows. A cell shows its count; its shade is the square root of its share.

    The share is that of the row.
    """
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    counts = np.array(matrix.counts, dtype=np.int64)
    labels = [_label(class_names[c]) for c in matrix.classes] + ["all others"] * matrix.others
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = len(labels)
    alt = f"Confusion matrix of {len(matrix.classes)} classes{' and all others' if matrix.others else ''}."
    wrong = counts - np.diag(np.diag(counts))
    row, column = np.unravel_index(wrong.argmax(), wrong.shape)
    if wrong.any():
        alt += f" The most: {wrong[row, column]} images of {labels[row]} taken for {labels[column]}."
    longest = max(map(len, labels))
    with drawing(name, height=3.6 + 0.07 * longest) as axes:
        shades = LinearSegmentedColormap.from_list("shares", ["#ffffff", ACCENT])
        axes.pcolormesh(share, cmap=shades, norm=PowerNorm(0.5, 0, 1), edgecolor=LINE, linewidth=0.4)
        size = min(8.0, 100 / side)
        for (i, j), count in np.ndenumerate(counts):
            if count:
                colour = "white" if share[i, j] > 0.3 else INK
                axes.text(j + 0.5, i + 0.5, str(count), ha="center", va="center", color=colour, fontsize=size)
        middles = np.arange(side) + 0.5
        axes.set_xticks(middles, labels, rotation=90 if longest > 3 else 0, fontsize=min(8.0, 140 / side))
        axes.set_yticks(middles, labels, fontsize=min(8.0, 140 / side))
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.invert_yaxis()
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        return Plot("Confusions", alt, _embedded(name, axes))


def calibration(name: str, bins: Sequence[CalibrationBin]) -> Plot:
    """Draw the reliability diagram: the accuracy of each bin against its mean probability, and its share of images."""
    known = [found for found in bins if found.accuracy is not None and found.confidence is not None]
    images = sum(found.images for found in bins)
    sure = 100 * np.array([found.confidence for found in known])
    right = 100 * np.array([found.accuracy for found in known])
    share = [100 * found.images / images for found in bins]
    words = [f"{s:.0f}%: {r:.0f}% right" for s, r in zip(sure, right, strict=True)]
    with drawing(name, height=3.4) as axes:
        edges = [*(100 * found.low for found in bins), 100.0]
        axes.stairs(share, edges, fill=True, color=LINE, label="share of the images")
        axes.plot(
            [0, 100], [0, 100], color=CONTRAST, linewidth=1.2, linestyle=DASHES, label="what the probability says"
        )
        axes.plot(sure, right, color=ACCENT, marker="o", markersize=4, label="right predictions")
        axes.set_xlim(0, 101)
        axes.set_ylim(0, 103)
        axes.set_xlabel("probability of the prediction (%)")
        axes.set_ylabel("of the images (%)")
        axes.figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2, handlelength=1.6)
        alt = f"Line chart of accuracy over the probability of the prediction. {'; '.join(words)}."
        return Plot("Calibration", alt, embed(name, axes))


def map_of_features(name: str, found: FeatureMap, classes: Sequence[int], class_names: Sequence[str]) -> Plot:
    """Draw images as small points and prototypes as large ones: up to six ``classes`` in colour, the others in grey."""

    def scatter(places: np.ndarray, **look: Any) -> None:
        axes.scatter(places[:, 0], places[:, 1], **look)

    labels = [_label(class_names[c], 28) for c in classes]
    with drawing(name, height=4.4) as axes:
        others, lone = (~np.isin(of, classes) for of in (found.labels, found.prototype_labels))
        scatter(found.images[others], s=5, color="#b3bcc2", linewidths=0, rasterized=True)
        quiet = {"color": "#7d878e", "edgecolors": "white", "rasterized": True}
        scatter(found.prototypes[lone], s=22, marker="X", linewidths=0.5, **quiet)
        for c, (colour, mark) in zip(classes, _MARKS, strict=False):
            look = {"color": colour, "marker": mark}
            scatter(found.images[found.labels == c], s=11, linewidths=0, alpha=0.6, label=str(c), **look)
            scatter(
                found.prototypes[found.prototype_labels == c], s=90, edgecolors=INK, linewidths=1.2, zorder=3, **look
            )
        axes.set_xticks([])
        axes.set_yticks([])
        share = "" if found.variance is None else f", {100 * found.variance:.0f}% of the variance"
        axes.set_xlabel(f"{found.method}{share}")
        if labels:
            legend = axes.figure.legend(loc="outside lower center", ncols=2, markerscale=1.6)
            for text, label in zip(legend.get_texts(), labels, strict=False):
                text.set_text(label)  # given as a label=, a name that begins with _ would be left out
        alt = f"Map of {len(found.images)} images and {len(found.prototypes)} prototypes by {found.method}."
        alt += f" Marked: {', '.join(labels)}." if labels else ""
        return Plot("What the loss sees", alt, _embedded(name, axes))


def _embedded(name: str, axes: Axes) -> str:
    with warnings.catch_warnings():  # matplotlib's font lacks letters that the reader's has
        warnings.filterwarnings("ignore", "Glyph")
        return embed(name, axes)
