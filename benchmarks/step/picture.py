"""Memory and time of the whole step against the number of classes, as an SVG for the README and docs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ltloss.training.pages.plots import STYLE, markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Case -> colour, dashes, label.
SERIES: dict[str, tuple[str, Any, str]] = {
    "dense + torch AdamW": ("#8a5a00", (0, (1, 1.2)), "the dense formula, torch AdamW"),
    "pytorch-metric-learning + torch AdamW": ("#b3367a", (0, (3, 1.2, 1, 1.2)), "pytorch-metric-learning, torch AdamW"),
    "linear_cross_entropy + torch AdamW": (
        "#7a4fb5",
        (0, (5, 1.2, 1, 1.2, 1, 1.2)),
        "F.linear_cross_entropy, torch AdamW",
    ),
    "torch AdamW": ("#5a646b", (0, (4, 1.5)), "ltloss, torch AdamW"),
    "PrototypeAdamW": ("#0072b2", "-", "ltloss, PrototypeAdamW"),
    "PrototypeAdamW, bfloat16": ("#00795a", (0, (6, 1.5, 1, 1.5)), "ltloss, PrototypeAdamW in bfloat16"),
}
_LARGE = {"font.size": 11, "axes.titlesize": 12, "legend.fontsize": 10.5, "lines.linewidth": 2.2}
_APART = 0.095  # least distance between the numbers at the ends of lines, as a fraction of the height


def _points(rows: Sequence[dict[str, Any]], column: str, unit: float) -> dict[str, list[tuple[float, float]]]:
    """Points (million classes, value) by case."""
    series: dict[str, list[tuple[float, float]]] = {name: [] for name in SERIES}
    for one in (one for one in rows if one["case"] == "over classes" and one.get(column)):
        series[one["optimizer"]].append((int(one["C"]) / 1e6, float(one[column]) / unit))
    return {name: sorted(points) for name, points in series.items() if points}


def _lines(axes: Axes, title: str, form: str, series: dict[str, list[tuple[float, float]]]) -> None:
    """Draw the lines, and at their ends the values, moved apart where they would touch."""
    top = max(y for points in series.values() for _, y in points)
    last = -1.0
    for name, points in sorted(series.items(), key=lambda item: item[1][-1][1]):
        colour, dashes, label = SERIES[name]
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=colour, linestyle=dashes, marker="o", markersize=4, label=label)
        last = max(ys[-1] / top, last + _APART)
        axes.annotate(
            form.format(ys[-1]),
            (xs[-1], last * top),
            (9, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )
    axes.set_title(title, loc="left")
    axes.set_ylim(0, 1.08 * top)
    axes.set_xlim(0, max(x for points in series.values() for x, _ in points) * 1.02)


def draw(rows: Sequence[dict[str, Any]]) -> str:
    """An SVG of two panels, one above the other, legible on a phone. The same rows give the same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**STYLE, **_LARGE, "svg.hashsalt": "ltloss-step"}):
        figure = Figure(figsize=(5.2, 6.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        seconds = _points(rows, "median_ms", 1e3)
        _lines(above, "Memory of the process (GiB)", "{:.2f}", _points(rows, "peak_mib", 1024))
        _lines(below, "Time of a whole training step (s)", "{:.2f}", seconds)
        below.set_xlabel("million classes ({N} samples, width {D})".format(**rows[0]))
        handles = {line.get_label(): line for line in above.get_lines()}
        labels = [label for _, _, label in SERIES.values() if label in handles]
        figure.legend([handles[label] for label in labels], labels, loc="outside upper left", ncols=1)
        return re.sub(r"[ \t]+$", "", markup(figure), flags=re.MULTILINE)
