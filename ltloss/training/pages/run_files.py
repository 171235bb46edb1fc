"""Read the files of a run for its report."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ltloss.errors import UserError
from ltloss.training.measure.details import Details
from ltloss.training.measure.metrics import Metrics
from ltloss.training.run.early_stopping import first_best
from ltloss.training.run.run_config import RunConfig

Epochs = dict[str, list[float]]


@dataclass(frozen=True)
class Run:
    """The content of a run's files."""

    path: Path
    config: RunConfig
    epochs: Epochs  # the columns of metrics.csv
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # evaluation.json, if it is of the epoch in use

    @property
    def stops_early(self) -> bool:
        """Whether the epoch in use is the best on the validation part, not the last."""
        return self.config.settings.early_stopping is not None

    @property
    def _row(self) -> int:
        found = self.epochs.get("validation_balanced_accuracy")
        return first_best(np.nan_to_num(found, nan=-1.0).tolist()) if self.stops_early and found else -1

    @property
    def last_epoch(self) -> int:
        """The epoch in use, from 1; with early stopping the best one."""
        return int(self.epochs["epoch"][self._row])

    @property
    def which(self) -> str:
        """The epoch in use, in words."""
        return "best validation epoch" if self.stops_early else "last epoch"

    @property
    def title(self) -> str:
        """The epoch in use, in words and with its number, capitalised."""
        return f"{self.which.capitalize()} ({self.last_epoch})"

    def last(self, name: str) -> float:
        """The value of a column at the epoch in use; NaN if it was measured neither then nor at the end."""
        value = self.epochs[name][self._row] if name in self.epochs else math.nan
        later = self.evaluation.get(name.removeprefix("test_"))
        return later if math.isnan(value) and isinstance(later, float) and math.isfinite(later) else value


@dataclass(frozen=True)
class Measured:
    """Results on the test images."""

    images: int  # number of test images
    accuracy: np.ndarray  # of each class, (C,); NaN where unknown
    details: Details | None  # None for a run of an early version, which stored none

    @classmethod
    def of(cls, metrics: Metrics, details: Details) -> Measured:
        """The part of the metrics that the report shows."""
        return cls(metrics.images, np.array(metrics.per_class, dtype=np.float64), details)


def _number(text: str | None) -> float:
    """The number; NaN, which leaves a gap in a curve, if it was not measured or is not finite."""
    value = float(text) if text else math.nan
    return value if math.isfinite(value) else math.nan


def read_epochs(run: Path) -> Epochs:
    """The columns of metrics.csv; UserError if it is damaged, or no epoch has finished."""
    path = run / "metrics.csv"
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        columns = {name: [_number(row[name]) for row in rows] for name in (rows[0] if rows else ())}
        if not all(epoch >= 1 and epoch.is_integer() for epoch in columns.get("epoch", [])):
            raise ValueError("an epoch is no whole number from 1")
    except FileNotFoundError:
        columns = {}
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}); finish another epoch, which writes it anew") from error
    if "epoch" not in columns:
        raise UserError(f"{run} has no finished epoch to report; finish one with `ltloss train --resume --out {run}`")
    return columns


def read_run(path: Path) -> Run:
    """The files of a run; UserError if it is no run, and as :func:`read_epochs` raises it."""
    run = Run(path, RunConfig.read(path), read_epochs(path))
    accuracy = run.last("test_accuracy")
    try:
        stored = json.loads((path / "evaluation.json").read_text(encoding="utf-8"))
        fresh = math.isnan(accuracy) or stored["accuracy"] == accuracy
        fresh &= stored.get("epoch", run.last_epoch) == run.last_epoch  # version 0.1 did not store it
        return (
            replace(run, evaluation=stored) if fresh and tuple(stored["per_class"]) == run.config.class_names else run
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return run  # the report then measures again


def read_measured(run: Run) -> Measured | None:
    """The results in evaluation.json; None if the run must be measured again."""
    stored = run.evaluation
    try:
        accuracy = np.array(list(stored["per_class"].values()), dtype=np.float64)
        return Measured(int(stored["pictures"]), accuracy, _read_details(stored, run.config.class_names))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _read_details(stored: Mapping[str, Any], class_names: tuple[str, ...]) -> Details | None:
    return Details.from_stored(stored, class_names) if "confusion_matrix" in stored else None
