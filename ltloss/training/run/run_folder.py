"""A run's folder: who may write into it, its config.json and its metrics.csv."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ltloss._deprecation import renamed_keys
from ltloss._files import TEMPORARY, write_csv, write_file
from ltloss.errors import UserError
from ltloss.training.data.sources import ACCEPTED, absolute_paths, check_same_classes
from ltloss.training.measure.metrics import COLUMNS
from ltloss.training.model.classifier import choose_device
from ltloss.training.run.lock import LOCK, refuse_if_written
from ltloss.training.run.run_config import RunConfig
from ltloss.training.run.settings import Settings, changed_settings
from ltloss.training.stored_keys import FORMER_SETTINGS


def open_run(out: Path, given: Mapping[str, Any], resume: bool) -> tuple[Settings, RunConfig | None]:
    """The settings of the run in ``out``, and its stored configuration if it continues a run. Writes nothing.

    Raises UserError if another process writes ``out``, if it holds a run and ``resume`` is false, if it holds other
    files, or if the run has other settings.
    """
    refuse_if_written(out)
    given = absolute_paths(renamed_keys(given, FORMER_SETTINGS))
    if (out / "config.json").is_file():
        if not resume:
            raise _holds_a_run(out)
        stored = RunConfig.read(out)
        changed = changed_settings(stored.settings, given)
        if changed:
            raise UserError(
                f"--resume of {out} with other settings: {', '.join(changed)}; leave them out, or start a new --out"
            )
        settings = dataclasses.replace(stored.settings, **{**given, "loss_options": stored.settings.loss_options})
        _refuse_inside_data(out, settings.data)
        return settings, stored
    refuse_foreign_files(out, "config.json", "")
    if resume:
        print(f"ltloss: {out} holds no run yet, starting from the beginning", file=sys.stderr)
    if not given.get("data"):
        raise UserError(f"--data is missing; give {ACCEPTED}")
    _refuse_inside_data(out, given["data"])
    return Settings(**given), None


def device_of_run(settings: Settings, given: Mapping[str, Any]) -> torch.device:
    """The device to train on; UserError if it cannot be used, other words if it was not ``given`` but stored."""
    try:
        return choose_device(settings.device)
    except UserError as error:
        if given.get("device") is not None:
            raise
        raise UserError(f"device {settings.device}, with which the run began, is not here; add --device cpu") from error


def check_still_new(out: Path) -> None:
    """Raise UserError if a run began in ``out`` since ``open_run`` found none."""
    if (out / "config.json").is_file():
        raise _holds_a_run(out)


def _holds_a_run(out: Path) -> UserError:
    return UserError(f"{out} already holds a run; continue it with --resume, or choose another --out")


def _refuse_inside_data(out: Path, data: str) -> None:
    if data != "digits" and Path(data).is_dir() and out.resolve().is_relative_to(Path(data).resolve()):
        raise UserError(
            f"--out {out} lies inside --data {data}, where it would count as a class; choose a folder outside of it"
        )


def refuse_foreign_files(out: Path, manifest: str, what: str) -> None:
    """Raise UserError if ``out`` is a file, or holds files but no ``manifest``; unfinished files do not count."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; choose a folder")
    if (out / manifest).is_file() or not out.is_dir():
        return
    if any(not path.name.startswith(TEMPORARY) and path.name != LOCK for path in out.iterdir()):
        raise UserError(f"--out {out} holds other files{what}; choose an empty or a new folder")


def check_same_data(stored: RunConfig, now: RunConfig, out: Path) -> None:
    """Raise UserError if the data differs from that with which the run began."""
    check_same_classes(stored.class_names, now.class_names, f"run {out}", now.settings.data)
    for name in ("image_shape", "class_counts", "mean", "std"):
        if getattr(stored, name) != getattr(now, name):
            raise UserError(
                f"{now.settings.data} changed since the run {out} began ({name}); restore it, or start a new --out"
            )
    if stored.versions != now.versions:
        print(f"ltloss: the run began with {stored.versions}, now {now.versions}: results may differ", file=sys.stderr)


def write_config(out: Path, config: RunConfig) -> None:
    """Write RUN/config.json."""
    write_file(out / "config.json", config.to_json().encode())


def write_metrics(out: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write RUN/metrics.csv, one row per epoch."""
    write_csv(out / "metrics.csv", COLUMNS, history)
