"""Checkpoints of a run: folders that are whole or absent. Reading them unpickles nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ltloss._files import new_folder, remove_folder, write_file
from ltloss.errors import UserError
from ltloss.training.measure.metrics import COLUMNS

KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after an epoch."""

    model: dict[str, Tensor]  # the weights to use
    optimizer: dict[str, Tensor]
    state: dict[str, Any]  # for JSON: the epoch, the metrics of all epochs so far, and the best epoch if it is used
    trained: dict[str, Tensor] = field(default_factory=dict)  # the weights in training, if ``model`` is their average


def save_checkpoint(run: Path, epoch: int, checkpoint: Checkpoint) -> Path:
    """Write RUN/checkpoints/epoch-NNNN; remove all but the newest two and the best epochs that these name."""
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    target = checkpoint_path(run, epoch)
    with new_folder(target) as unfinished:
        write_file(unfinished / "model.safetensors", to_bytes(checkpoint.model))
        write_file(unfinished / "optimizer.safetensors", to_bytes(checkpoint.optimizer))
        if checkpoint.trained:
            write_file(unfinished / "trained.safetensors", to_bytes(checkpoint.trained))
        write_file(unfinished / "state.json", (json.dumps(checkpoint.state) + "\n").encode())
    found = _checkpoints(run)
    needed = {*found[-KEPT:], *map(_used, found[-KEPT:])}
    for old in found:
        if old not in needed:
            remove_folder(old)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder; UserError if a part is missing or damaged."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        _check_state(state)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to use the one before") from error
    model, optimizer = (read_tensors(path / f"{name}.safetensors") for name in ("model", "optimizer"))
    trained = path / "trained.safetensors"
    return Checkpoint(model, optimizer, state, read_tensors(trained) if trained.is_file() else {})


def _check_state(state: Any) -> None:
    """Raise ValueError unless the history has a row for each epoch, with numbers (or None: not measured) by column."""
    history = state.get("history") if isinstance(state, dict) else None
    if not isinstance(history, list):
        raise ValueError("state.json lacks the history")
    for epoch, row in enumerate(history, 1):
        if not isinstance(row, dict) or row.get("epoch") != epoch or not set(row) <= set(COLUMNS):
            raise ValueError(f"row {epoch} of the history in state.json is not that of epoch {epoch}")
        if any(isinstance(value, bool) or not isinstance(value, (int, float, type(None))) for value in row.values()):
            raise ValueError(f"row {epoch} of the history in state.json holds something that is no number")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; UserError if it is missing or damaged."""
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); remove {path.parent} to use the checkpoint before") from error
    return tensors


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint folder of a run, or None."""
    found = _checkpoints(run)
    return found[-1] if found else None


def checkpoint_in_use(run: Path) -> Path | None:
    """The checkpoint to measure and use: the newest, or with early stopping that of the best epoch so far."""
    newest = latest_checkpoint(run)
    return None if newest is None else _used(newest)


def _used(path: Path) -> Path:
    """The checkpoint of the epoch ``best`` in this one's state; this one if there is no such entry."""
    try:
        return checkpoint_path(path.parents[1], json.loads((path / "state.json").read_text(encoding="utf-8"))["best"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # damage is reported where all is read
        return path


def checkpoint_path(run: Path, epoch: int) -> Path:
    """The folder for the checkpoint of an epoch (from 1)."""
    return run / "checkpoints" / f"epoch-{epoch:04d}"


def _checkpoints(run: Path) -> list[Path]:
    numbered = {}
    for path in run.glob("checkpoints/epoch-*"):
        number = path.name.removeprefix("epoch-")
        if number.isdecimal():
            numbered[int(number)] = path
    return [numbered[number] for number in sorted(numbered)]


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as the content of a safetensors file."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content: bytes = safetensors.torch.save(contiguous)
    return content
