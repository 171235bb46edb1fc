"""The figures of the report as SVG, with text in the font of the page."""

from __future__ import annotations

import io
import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours of a light page (`html.py`); in dark mode a figure keeps its light background.
INK, QUIET, LINE, ACCENT, CONTRAST = "#1d2327", "#5a646b", "#d5dadd", "#0072b2", "#c2500a"
DASHES = (0, (4, 1.5))
_LABEL_WIDTH = 34  # characters of a row's label, before it is wrapped
_RASTER_ABOVE = 3000  # points; more are drawn as pixels, as vectors would make the page megabytes long

STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the reader's font
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "patch.linewidth": 0.5,
}


@dataclass(frozen=True)
class Plot:
    """One figure: ``title`` and ``alt`` are text, ``svg`` is markup."""

    title: str
    alt: str
    svg: str


@contextmanager
def drawing(name: str, height: float = 3.1) -> Iterator[Axes]:
    """Give axes in this module's style; draw on them, and call ``embed``, within the block."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**STYLE, "svg.hashsalt": f"ltloss-{name}"}):  # the same data gives the same bytes
        yield Figure(figsize=(5.2, height), layout="constrained").add_subplot()


def markup(figure: Any) -> str:
    """A figure as SVG, without prologue and date, in the reader's font."""
    stream = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", dpi=150, metadata=metadata)
    svg = stream.getvalue()
    return re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 system-ui, sans-serif", svg[svg.index("<svg") :])


def embed(name: str, axes: Axes) -> str:
    """The drawing as markup to put into a page: no prologue, unique ids, and the page's font and width."""
    svg = re.sub(r"<(metadata|title)>.*?</\1>\s*", "", markup(axes.figure), flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", svg)
    return re.sub(r'<svg\b[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, count=1)


def learning_curve(
    name: str, title: str, epochs: Sequence[int], series: dict[str, list[float]], *, axis: str, percent: bool = False
) -> Plot:
    """Draw up to two series over the epochs, which differ in colour and dashes; NaN leaves a gap."""
    from matplotlib.ticker import MaxNLocator

    unit = "%" if percent else ""
    ends = [f"{label} goes from {values[0]:.4g}{unit} to {values[-1]:.4g}{unit}" for label, values in series.items()]
    alt = f"Line chart over epochs {epochs[0]} to {epochs[-1]}: {'; '.join(ends)}."
    with drawing(name) as axes:
        looks = ((ACCENT, "-"), (CONTRAST, DASHES))
        for (label, values), (colour, style) in zip(series.items(), looks, strict=False):
            marker = "o" if len(epochs) < 3 else None
            axes.plot(epochs, values, color=colour, linestyle=style, marker=marker, markersize=4, label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel(axis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if percent:
            axes.set_ylim(0, 101)
        elif np.nanmin([value for values in series.values() for value in values]) >= 0:
            axes.set_ylim(bottom=0)
        axes.legend(loc="best")
        return Plot(title, alt, embed(name, axes))


def accuracy_by_count(name: str, counts: np.ndarray, accuracy: np.ndarray) -> Plot:
    """Draw a point per class: test accuracy (C,) in [0, 1], NaN where unknown, against training images (C,)."""
    known = np.isfinite(accuracy)
    counts, percent = counts[known], 100 * accuracy[known]
    alt = (
        f"Scatter chart with a point for each class: {len(counts)} in all, {counts.min()} to {counts.max()} training "
        f"images, test accuracy {percent.min():.1f}% to {percent.max():.1f}%, {percent.mean():.1f}% on average."
    )
    raster = len(counts) > _RASTER_ABOVE
    size, alpha = (4, 0.25) if raster else (30, 0.7)
    with drawing(name) as axes:
        axes.set_xscale("log")
        axes.scatter(np.maximum(counts, 1), percent, linewidths=0, rasterized=raster, color=ACCENT, s=size, alpha=alpha)
        axes.axhline(percent.mean(), color=CONTRAST, linewidth=1.2, linestyle=DASHES, label="mean of the classes")
        axes.set_ylim(-3, 103)
        _plain_log_ticks(axes, counts)
        axes.set_xlabel("training images of the class (logarithmic)")
        axes.set_ylabel("test accuracy of the class (%)")
        axes.legend(loc="best")
        return Plot("Accuracy and class size", alt, embed(name, axes))


def _plain_log_ticks(axes: Axes, counts: np.ndarray) -> None:
    """Label ticks 10, 20, 50, ... instead of powers of ten; over a long range fewer of them, over a short one more."""
    from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    low, high = max(int(counts.min()), 1), max(int(counts.max()), 1)
    locator: Locator = LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,))
    if high < 2 * low:  # no power of ten may be near
        locator = MaxNLocator(5, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(low / 1.3, high * 1.3)


def groups(name: str, bars: Sequence[tuple[str, float | None]]) -> Plot:
    """Draw accuracies in [0, 1] as bars of (label, accuracy); ``None``, a group without classes, is shown as "none"."""
    percents = [100 * (value or 0) for _, value in bars]
    texts = ["none" if value is None else f"{100 * value:.1f}%" for _, value in bars]
    words = "; ".join(f"{label}: {text}" for (label, _), text in zip(bars, texts, strict=True))
    positions = range(len(bars))
    with drawing(name, height=2.2) as axes:
        axes.barh(positions, percents, color=ACCENT, height=0.6)
        for position, percent, text in zip(positions, percents, texts, strict=True):
            axes.text(percent + 1.5, position, text, va="center", color=QUIET if text == "none" else INK)
        axes.set_yticks(positions, [label for label, _ in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, 115)
        axes.set_xticks(range(0, 101, 20))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("test accuracy (%)")
        alt = f"Bar chart of the test accuracy by class size. {words}."
        return Plot("Many, medium and few", alt, embed(name, axes))


def means_with_spread(name: str, title: str, rows: Sequence[tuple[str, float | None, float]], *, axis: str) -> Plot:
    """Draw a dot with its deviation for each (label, mean, deviation) in percent, "none" for a mean of None."""
    from matplotlib.ticker import MaxNLocator

    texts = ["none" if mean is None else f"{mean:.1f} ± {spread:.1f}" for _, mean, spread in rows]
    words = "; ".join(f"{label}: {text}" for (label, _, _), text in zip(rows, texts, strict=True))
    # matplotlib would read a pair of dollar signs as mathematics.
    labels = [[line.replace("$", r"\$") for line in textwrap.wrap(label, _LABEL_WIDTH)] for label, _, _ in rows]
    # The height of a row is the number of lines of its label; the dot is in the middle.
    ends = list(itertools.accumulate(map(len, labels)))
    positions = [end - len(lines) / 2 for end, lines in zip(ends, labels, strict=True)]
    known = [(mean - spread, mean + spread) for _, mean, spread in rows if mean is not None]
    low, high = min((left for left, _ in known), default=0.0), max((right for _, right in known), default=1.0)
    room = max(high - low, 1.0)
    with drawing(name, height=0.8 + 0.26 * ends[-1]) as axes:
        for position, (_, mean, spread), text in zip(positions, rows, texts, strict=True):
            if mean is not None:
                axes.errorbar(mean, position, xerr=spread, color=ACCENT, fmt="o", markersize=4)
            right = low if mean is None else mean + spread
            axes.text(right + 0.04 * room, position, text, va="center", color=QUIET if mean is None else INK)
        axes.set_yticks(positions, ["\n".join(lines) for lines in labels])
        axes.set_ylim(ends[-1], 0)
        start, stop = axes.set_xlim(low - 0.05 * room, high + 0.4 * room)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))  # more would touch each other
        axes.set_xticks([tick for tick in axes.get_xticks() if max(start, 0) <= tick <= min(stop, 100)])
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(axis)
        return Plot(title, f"{axis}. {words}.", embed(name, axes))


def histogram(
    name: str, title: str, values: np.ndarray, *, axis: str, what: str, mark: tuple[float, str] | None = None
) -> Plot:
    """Draw a histogram of values; ``what`` names what is counted, ``mark`` is a vertical line (value, label)."""
    from matplotlib.ticker import MaxNLocator

    low, high, middle = float(values.min()), float(values.max()), float(np.median(values))
    alt = f"Histogram of {len(values)} {what} by {axis}: {low:.3g} to {high:.3g}, median {middle:.3g}."
    if high - low < 1e-3 * max(abs(high), 1e-9):  # nearly equal values: draw one bar of visible width
        low, high = middle - max(abs(middle), 1) * 0.05, middle + max(abs(middle), 1) * 0.05
    bins = int(np.clip(np.sqrt(len(values)) * 2, 8, 60))
    with drawing(name) as axes:
        axes.hist(values, bins=bins, range=(low, high), color=ACCENT, edgecolor="white")
        if mark is not None:
            axes.axvline(mark[0], color=CONTRAST, linewidth=1.2, linestyle=DASHES, label=mark[1])
            axes.legend(loc="best")
            alt += f" Marked: {mark[1]}."
        axes.set_xlabel(axis)
        axes.set_ylabel(f"number of {what}")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(visible=False, axis="x")
        return Plot(title, alt, embed(name, axes))
