"""The results of a comparison: a row for each run, and their mean and deviation over the seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .class_groups import Thresholds
from .methods import described, method
from .run_folder import write_csv

GROUPS = ("many", "medium", "few")
_LAST = {"accuracy": "test_accuracy", "balanced_accuracy": "balanced_accuracy", **{name: name for name in GROUPS}}
COLUMNS = (
    *("method", "title", "chosen", "variant", "seed", "last_epoch"),
    *(f"last_{name}" for name in _LAST),
    "last_calibration_error",
    "best_epoch",
    *(f"best_{name}" for name in _LAST),
    *("angle_min_degrees", "angle_mean_degrees", "seconds_per_epoch"),
    *("pictures_train", "pictures_test", "device", "torch", "failed"),
)
TUNING_COLUMNS = ("method", "values", "balanced_accuracy", "chosen")


@dataclass(frozen=True)
class Trial:
    """One point of a search space. `accuracy` is the balanced one on the validation split; None: it diverged."""

    method: str
    values: Mapping[str, Any]
    accuracy: float | None
    chosen: bool = False


@dataclass(frozen=True)
class FinalRun:
    """One training measured on the test split; `columns` are those of results.csv."""

    method: str
    chosen: Mapping[str, Any]
    variant: Mapping[str, Any]
    seed: int
    columns: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]

    @classmethod
    def of(
        cls,
        name: str,
        chosen: Mapping[str, Any],
        variant: Mapping[str, Any],
        seed: int,
        result: Mapping[str, Any],
    ) -> FinalRun:
        """The run that a job's result describes.

        The best epoch is that of the highest test accuracy, the earliest of several: what many papers report, chosen
        on the test split. A second stage without epochs has none.
        """
        history = [] if result["failed"] else [row for row in result["history"] if row["test_accuracy"] is not None]
        last: Mapping[str, Any] = history[-1] if history else {}
        best: Mapping[str, Any] = max(history, key=lambda row: row["test_accuracy"]) if len(history) > 1 else {}
        angles = result["angles"] or {}
        columns = {
            "method": name,
            "title": method(name).title,
            "chosen": described(chosen),
            "variant": described(variant),
            "seed": seed,
            "last_epoch": last.get("epoch"),
            **{f"last_{column}": last.get(source) for column, source in _LAST.items()},
            "last_calibration_error": last.get("calibration_error"),
            "best_epoch": best.get("epoch"),
            **{f"best_{column}": best.get(source) for column, source in _LAST.items()},
            "angle_min_degrees": angles.get("min"),
            "angle_mean_degrees": angles.get("mean"),
            "seconds_per_epoch": result["seconds_per_epoch"],
            "pictures_train": result["pictures"][0],
            "pictures_test": result["pictures"][1],
            "device": result["device"],
            "torch": result["versions"]["torch"],
            "failed": result["failed"],
        }
        return cls(name, chosen, variant, seed, columns, history)


@dataclass(frozen=True)
class Comparison:
    """What a comparison found; `runs` are the rows of results.csv, `trials` those of tuning.csv."""

    out: Path
    settings: Mapping[str, Any]
    thresholds: Thresholds
    runs: tuple[FinalRun, ...]
    trials: tuple[Trial, ...]

    def to_text(self) -> str:
        """The table for a terminal: percent, mean ± standard deviation over the seeds."""
        lines = summary(self.runs, self.thresholds)
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        shown = ["  ".join(_padded(line, widths)).rstrip() for line in lines]
        chosen = [f"  {trial.method}: {described(trial.values)}" for trial in self.trials if trial.chosen]
        return "\n".join([*shown, *(["", "chosen on the validation split:", *chosen] if chosen else [])])


def _padded(line: Sequence[str], widths: Sequence[int]) -> Iterable[str]:
    return [
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]


def by_method(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Rows of results.csv by method and variant, in their order."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["method"], row["variant"]), []).append(row)
    return found


def summary(runs: Iterable[FinalRun], thresholds: Thresholds) -> list[list[str]]:
    """The table over the seeds, a header first; percent but for angles and seconds."""
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
    for (name, variant), rows in by_method(run.columns for run in runs).items():
        worked = [row for row in rows if not row["failed"]]
        title = method(name).title + (f" ({variant})" if variant else "")
        failed = f" ({len(rows) - len(worked)} diverged)" if len(worked) < len(rows) else ""
        cells = [show([row[column] for row in worked]) for _, column, show in columns]
        lines.append([title, f"{len(worked)}{failed}", *cells])
    return lines


def percents(shares: Sequence[float | None]) -> str:
    """Shares as 'mean ± deviation' in percent with two decimals; 'none' where there is nothing to measure."""
    return numbers([None if share is None else 100 * share for share in shares], 2)


def numbers(values: Sequence[float | None], digits: int = 1) -> str:
    """Numbers as 'mean ± deviation', a single one without; 'none' where there is nothing to measure."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    mean = f"{statistics.mean(known):.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean


def write_tables(found: Comparison) -> None:
    """Write results.csv and tuning.csv."""
    write_csv(found.out / "results.csv", COLUMNS, (run.columns for run in found.runs))
    if found.trials:
        rows = [
            {
                "method": trial.method,
                "values": json.dumps(dict(trial.values)),
                "balanced_accuracy": trial.accuracy,
                "chosen": int(trial.chosen),
            }
            for trial in found.trials
        ]
        write_csv(found.out / "tuning.csv", TUNING_COLUMNS, rows)
