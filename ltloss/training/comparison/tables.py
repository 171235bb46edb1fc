"""The results of a comparison: a row for each run, and mean and standard deviation over the seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ltloss._files import write_csv
from ltloss.training.comparison.methods import described, method
from ltloss.training.measure.class_groups import Thresholds
from ltloss.training.stored_keys import stored

GROUPS = ("many", "medium", "few")
_ACCURACIES = ("accuracy", "balanced_accuracy", *GROUPS)


@dataclass(frozen=True)
class Trial:
    """One point of a search space.

    Attributes:
        method: name of the method.
        values: the point.
        accuracy: balanced accuracy on the validation split; None if a training diverged.
        seconds: time of its trainings.
        chosen: whether it is the best trial of its method.
        edges: axes at whose first or last value it lies, as ``ltloss.training.comparison.climb.edges`` returns them.
    """

    method: str
    values: Mapping[str, Any]
    accuracy: float | None
    seconds: float
    chosen: bool = False
    edges: Mapping[str, str] = field(default_factory=dict)

    @property
    def described(self) -> str:
        """The values as text, with a note on those at an end of their list."""
        known = described(self.values)
        ends = ", ".join(f"{name} the {end} of its list" for name, end in self.edges.items())
        return f"{known} ({ends})" if ends else known


@dataclass(frozen=True)
class FinalRun:
    """One training measured on the test split: its method and values, and the result of its job."""

    method: str
    chosen: Mapping[str, Any]
    variant: Mapping[str, Any]
    seed: int
    result: Mapping[str, Any]
    thresholds: Thresholds

    @cached_property
    def columns(self) -> dict[str, Any]:
        """Its row of results.csv.

        The best epoch is the first with the highest test accuracy. It is chosen on the test split, as in many papers. A
        second stage without epochs has none.
        """
        result, angles = self.result, self.result["angles"] or {}
        good = not result["failed"]
        last, best = (_measured(result[which] if good else None, result, self.thresholds) for which in ("last", "best"))
        return {
            "method": self.method,
            "title": method(self.method).title,
            "chosen": described(self.chosen),
            "variant": described(self.variant),
            "seed": self.seed,
            **{f"last_{column}": last.get(column) for column in ("epoch", *_ACCURACIES, "calibration_error")},
            **{f"best_{column}": best.get(column) for column in ("epoch", *_ACCURACIES)},
            "angle_min_degrees": angles.get("min"),
            "angle_mean_degrees": angles.get("mean"),
            "seconds_per_epoch": result["seconds_per_epoch"],
            "seconds": result["seconds"],
            **stored(asdict(self.thresholds)),
            "pictures_train": result["pictures"][0],
            "pictures_test": result["pictures"][1],
            "device": result["device"],
            "torch": result["versions"]["torch"],
            "failed": result["failed"],
        }


def _measured(found: Mapping[str, Any] | None, result: Mapping[str, Any], thresholds: Thresholds) -> dict[str, Any]:
    """The metrics after one epoch, with class groups by ``thresholds``; empty if nothing was measured."""
    if found is None:
        return {}
    per_class = np.array([np.nan if value is None else value for value in found["per_class"]], dtype=np.float64)
    return {**found, **thresholds.means(per_class, result["class_counts"])}


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison: ``runs`` are the rows of results.csv, ``trials`` those of tuning.csv."""

    out: Path
    settings: Mapping[str, Any]
    thresholds: Thresholds
    runs: tuple[FinalRun, ...]
    trials: tuple[Trial, ...]

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """The rows of results.csv."""
        return [run.columns for run in self.runs]

    @property
    def page(self) -> Path:
        """The HTML page."""
        return self.out / "comparison.html"

    def to_text(self) -> str:
        """The table for a terminal: percent, mean ± standard deviation over the seeds."""
        lines = summary(self.rows)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = [
            "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip()
            for first, *others in lines
        ]
        chosen = [f"  {trial.method}: {trial.described}" for trial in self.trials if trial.chosen]
        return "\n".join([*shown, *(["", "chosen on the validation split:", *chosen] if chosen else [])])


def by_method(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Rows of results.csv by method and variant, in their order."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["method"], row["variant"]), []).append(row)
    return found


def row_title(name: str, variant: str) -> str:
    """The title of a row of the tables."""
    return method(name).title + (f" ({variant})" if variant else "")


def summary(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table over the seeds for rows of results.csv, a header first; in percent except angles and seconds."""
    thresholds = Thresholds(rows[0]["many_above"], rows[0]["few_below"])
    words = thresholds.describe()
    columns: list[tuple[str, str, Callable[[Sequence[float | None]], str]]] = [
        ("last epoch", "last_accuracy", percents),
        *((words[name], f"last_{name}", percents) for name in GROUPS),
        ("best epoch", "best_accuracy", percents),
        ("ECE", "last_calibration_error", percents),
        ("least angle °", "angle_min_degrees", numbers),
        ("mean angle °", "angle_mean_degrees", numbers),
        ("s/epoch", "seconds_per_epoch", numbers),
    ]
    lines = [["method", "seeds", *(title for title, _, _ in columns)]]
    for (name, variant), each in by_method(rows).items():
        worked = [row for row in each if not row["failed"]]
        failed = f" ({len(each) - len(worked)} diverged)" if len(worked) < len(each) else ""
        cells = [show([row[column] for row in worked]) for _, column, show in columns]
        lines.append([row_title(name, variant), f"{len(worked)}{failed}", *cells])
    return lines


def percents(fractions: Sequence[float | None]) -> str:
    """Fractions as 'mean ± standard deviation' in percent with two decimals; 'none' without values."""
    return numbers([None if fraction is None else 100 * fraction for fraction in fractions], 2)


def numbers(values: Sequence[float | None], digits: int = 1) -> str:
    """Numbers as 'mean ± standard deviation', a single one as it is; 'none' without values."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    mean = f"{statistics.mean(known):.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean


def write_tables(found: Comparison) -> None:
    """Write results.csv, and tuning.csv if there are trials."""
    write_csv(found.out / "results.csv", list(found.rows[0]), found.rows)
    if found.trials:
        rows = [
            {
                "method": trial.method,
                "values": json.dumps(dict(trial.values)),
                "balanced_accuracy": trial.accuracy,
                "seconds": trial.seconds,
                "chosen": int(trial.chosen),
            }
            for trial in found.trials
        ]
        write_csv(found.out / "tuning.csv", list(rows[0]), rows)
