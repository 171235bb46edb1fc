"""The page of a comparison: its tables, the spread over the seeds, and what was tuned."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ltloss._files import write_file
from ltloss.training.comparison.methods import described, method
from ltloss.training.comparison.tables import GROUPS, Comparison, by_method, percents, row_title, summary
from ltloss.training.pages.html import PLOTS_STYLE, details, escape, figure, page, table, tiles
from ltloss.training.pages.plots import means_with_spread
from ltloss.training.run.settings import SETTINGS

_ABOUT_EPOCHS = (
    "Last epoch: what a user gets. Best epoch: the highest test accuracy of any measured epoch, chosen on the test "
    "split itself, as many papers report; a second stage without epochs has none. ECE: calibration error in 15 bins. "
    "Angles: of each class prototype to the nearest other, after the last epoch. s/epoch: training only, as measured "
    "with the other trainings running beside it."
)


def write_page(found: Comparison) -> Path:
    """Write comparison.html, self-contained, and return its path. The same results give the same bytes."""
    title = f"Comparison {found.out.resolve().name}"
    write_file(found.page, "".join(page(title, _body(found, title), style=PLOTS_STYLE)).encode())
    return found.page


def _body(found: Comparison, title: str) -> Iterator[str]:
    yield f"<h1>{escape(title)}</h1>"
    yield f'<p class="quiet">{escape(found.settings["data"])}</p>'
    seeds = {run.seed for run in found.runs}
    facts = found.runs[0].columns
    yield tiles(
        [
            ("methods and variants", str(len(by_method(found.rows)))),
            ("seeds", str(len(seeds))),
            ("training images", f"{facts['pictures_train']:,}"),
            ("test images", f"{facts['pictures_test']:,}"),
        ]
    )
    lines = summary(found.rows)
    yield "<h2>Test accuracy, %: mean ± standard deviation over the seeds</h2>"
    yield table(lines[0], lines[1:], numeric=range(1, len(lines[0])), stacked=True)
    yield f'<p class="quiet">{escape(_ABOUT_EPOCHS)}</p>'
    shown = dict(_figures(found))
    figures = "".join(drawn for drawn in shown.values() if drawn)
    yield f'<h2>Last epoch</h2>\n<div class="plots">\n{figures}\n</div>'
    absent = ", ".join(words for words, drawn in shown.items() if not drawn)
    if absent:
        yield f'<p class="quiet">{escape(f"Nothing was measured of: {absent}.")}</p>'
    yield from _failures(found)
    yield from _chosen(found)
    yield from _configuration(found)


def _figures(found: Comparison) -> Iterator[tuple[str, str]]:
    """The title of each group and its figure; the figure is empty if no run has a value."""
    words = {"accuracy": "All test images", **found.thresholds.describe()}
    rows = by_method(found.rows)
    for column in ("accuracy", *GROUPS):
        shown = [(row_title(*key), *_spread([row[f"last_{column}"] for row in each])) for key, each in rows.items()]
        if all(mean is None for _, mean, _ in shown):
            yield words[column], ""
            continue
        plot = means_with_spread(column, words[column], shown, axis="test accuracy (%)")
        about = "Mean and standard deviation over the seeds, after the last epoch."
        about = about if column == "accuracy" else f"Mean accuracy of the group's classes. {about}"
        yield words[column], figure(plot, about)


def _spread(fractions: Sequence[float | None]) -> tuple[float | None, float]:
    known = [100 * fraction for fraction in fractions if fraction is not None]
    if not known:
        return None, 0.0
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def _failures(found: Comparison) -> Iterator[str]:
    failed = [(row_title(run.method, run.columns["variant"]), run.seed, run.columns["failed"]) for run in found.runs]
    failed = [row for row in failed if row[2]]
    if failed:
        yield "<h2>Trainings that diverged</h2>"
        yield table(["method", "seed", "reason"], failed, numeric=(1,))


def _chosen(found: Comparison) -> Iterator[str]:
    yield "<h2>Methods and their values</h2>"
    values = {run.method: run.chosen for run in found.runs}
    rows = [(method(name).title, _values(name, chosen), method(name).source) for name, chosen in values.items()]
    yield table(["method", "values beside the common ones", "source"], rows)
    if not found.trials:
        yield '<p class="quiet">Nothing was tuned.</p>'
        return
    yield '<p class="quiet">Tuned by the balanced accuracy of the last epoch on the validation split.</p>'
    trials = [
        (method(trial.method).title, trial.described, percents([trial.accuracy]), "chosen" if trial.chosen else "")
        for trial in found.trials
    ]
    yield details("Every trial", table(["method", "values", "balanced accuracy, %", ""], trials, numeric=(2,)))


def _values(name: str, chosen: Mapping[str, Any]) -> str:
    kind = method(name)
    after = f"after {method(kind.base).title}: " if kind.base else ""
    return after + described({**kind.settings, **chosen})


def _configuration(found: Comparison) -> Iterator[str]:
    yield "<h2>Common settings</h2>"
    known = [(name, found.settings[name]) for name in SETTINGS if name in found.settings]
    yield table(["setting", "value"], [(name, "default" if value in (None, {}) else value) for name, value in known])
