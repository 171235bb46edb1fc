"""What the files of a run say, for its report."""

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
    """What the run's own files say."""

    path: Path
    config: RunConfig
    epochs: Epochs
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # evaluation.json, if it is of the epoch that is used

    @property
    def stops_early(self) -> bool:
        """Whether the epoch that is used is the best on the validation part, not the last."""
        return self.config.settings.early_stopping is not None

    @property
    def _row(self) -> int:
        found = self.epochs.get("validation_balanced_accuracy")
        return first_best(np.nan_to_num(found, nan=-1.0).tolist()) if self.stops_early and found else -1

    @property
    def last_epoch(self) -> int:
        """The epoch that is used."""
        return int(self.epochs["epoch"][self._row])

    @property
    def which(self) -> str:
        """That epoch in words."""
        return "best validation epoch" if self.stops_early else "last epoch"

    @property
    def title(self) -> str:
        """The same with its number, as a sentence begins."""
        return f"{self.which.capitalize()} ({self.last_epoch})"

    def last(self, name: str) -> float:
        """The value of the epoch that is used, NaN where it was measured neither then nor at the end."""
        value = self.epochs[name][self._row] if name in self.epochs else math.nan
        later = self.evaluation.get(name.removeprefix("test_"))
        return later if math.isnan(value) and isinstance(later, float) and math.isfinite(later) else value


@dataclass(frozen=True)
class Measured:
    """What was measured on the test images: accuracy (C,) of each class, NaN where unknown, and where it is wrong."""

    images: int
    accuracy: np.ndarray
    details: Details | None  # which an early run did not store

    @classmethod
    def of(cls, metrics: Metrics, details: Details) -> Measured:
        """The part of the metrics that the report shows."""
        return cls(metrics.images, np.array(metrics.per_class, dtype=np.float64), details)


def _number(text: str | None) -> float:
    """NaN for what was not measured or is infinite: a gap in a curve."""
    value = float(text) if text else math.nan
    return value if math.isfinite(value) else math.nan


def read_epochs(run: Path) -> Epochs:
    """The columns of metrics.csv; UserError where it is damaged, or no epoch has finished."""
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
    """The files of a run; UserError where it is no run, or as :func:`read_epochs` has it."""
    run = Run(path, RunConfig.read(path), read_epochs(path))
    accuracy = run.last("test_accuracy")
    try:
        stored = json.loads((path / "evaluation.json").read_text(encoding="utf-8"))
        fresh = math.isnan(accuracy) or stored["accuracy"] == accuracy
        return (
            replace(run, evaluation=stored) if fresh and tuple(stored["per_class"]) == run.config.class_names else run
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return run  # it can be measured again


def read_measured(run: Run) -> Measured | None:
    """What evaluation.json says of the classes; None where it must be measured again."""
    stored = run.evaluation
    try:
        accuracy = np.array(list(stored["per_class"].values()), dtype=np.float64)
        return Measured(int(stored["pictures"]), accuracy, _read_details(stored, run.config.class_names))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _read_details(stored: Mapping[str, Any], class_names: tuple[str, ...]) -> Details | None:
    return Details.from_stored(stored, class_names) if "confusion_matrix" in stored else None
