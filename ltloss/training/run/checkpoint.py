"""Files that are either whole or absent, whatever moment the process dies at; nothing is unpickled.

A checkpoint is a directory that is written under a temporary name, flushed to the disk and then renamed. A reader
therefore never sees half of one, and a full disk leaves the former one as it was.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ltloss.training.errors import UserError
from ltloss.training.measure.metrics import COLUMNS

KEPT = 2
TEMPORARY = ".tmp"


@dataclass(frozen=True)
class Checkpoint:
    """What an epoch leaves behind. `state` is JSON: the epoch and the metrics of every epoch so far."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that `path` holds either its former content or all of the new one."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        _write_flushed(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_directory(path.parent)


def save_checkpoint(run: Path, epoch: int, checkpoint: Checkpoint) -> Path:
    """Write RUN/checkpoints/epoch-NNNN and drop all but the newest two."""
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    target = folder / f"epoch-{epoch:04d}"
    with _new_directory(target) as temporary:
        _write_flushed(temporary / "model.safetensors", to_bytes(checkpoint.model))
        _write_flushed(temporary / "optimizer.safetensors", to_bytes(checkpoint.optimizer))
        _write_flushed(temporary / "state.json", (json.dumps(checkpoint.state) + "\n").encode())
    for old in _checkpoints(run)[:-KEPT]:
        _remove(old)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint directory; UserError where a part is missing or damaged."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        _check_state(state)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to use the one before") from error
    return Checkpoint(read_tensors(path / "model.safetensors"), read_tensors(path / "optimizer.safetensors"), state)


def _check_state(state: Any) -> None:
    """ValueError where a state lacks its history: one row an epoch, numbers (or None: not measured) by column."""
    history = state.get("history") if isinstance(state, dict) else None
    if not isinstance(history, list):
        raise ValueError("state.json lacks the history")
    for epoch, row in enumerate(history, 1):
        if not isinstance(row, dict) or row.get("epoch") != epoch or not set(row) <= set(COLUMNS):
            raise ValueError(f"row {epoch} of the history in state.json is not that of epoch {epoch}")
        if any(isinstance(value, bool) or not isinstance(value, (int, float, type(None))) for value in row.values()):
            raise ValueError(f"row {epoch} of the history in state.json holds something that is no number")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; UserError where it is missing or damaged."""
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); remove {path.parent} to use the checkpoint before") from error
    return tensors


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint directory of a run, or None."""
    found = _checkpoints(run)
    return found[-1] if found else None


def remove_leftovers(run: Path) -> None:
    """Remove what a killed process left under temporary names."""
    for path in [*run.glob(f"*{TEMPORARY}"), *run.glob(f"checkpoints/*{TEMPORARY}")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _checkpoints(run: Path) -> list[Path]:
    numbered = {}
    for path in run.glob("checkpoints/epoch-*"):
        number = path.name.removeprefix("epoch-")
        if number.isdecimal():
            numbered[int(number)] = path
    return [numbered[number] for number in sorted(numbered)]


@contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    temporary = target.with_name(target.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _flush_directory(temporary)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush_directory(target.parent)


def _remove(checkpoint: Path) -> None:
    # Renamed first: a process killed while deleting must not leave half a checkpoint under a valid name.
    doomed = checkpoint.with_name(checkpoint.name + TEMPORARY)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file that holds the tensors."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content: bytes = safetensors.torch.save(contiguous)
    return content


def _write_flushed(path: Path, content: bytes) -> None:
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)  # a failed write does not name its file
        raise


def _flush_directory(path: Path) -> None:
    """Make a rename durable; Windows cannot open directories and does not need it."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
