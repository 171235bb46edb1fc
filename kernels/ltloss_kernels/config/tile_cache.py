"""Tiles that were measured on this machine: a file that ``ltloss tune`` writes and the kernels read.

The file is ``$LTLOSS_TILES``, or ``ltloss/tiles.json`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. If ``$LTLOSS_TILES`` is
set but empty, no file is used. The file is a JSON object with one entry per kernel, architecture, dtype and precision.
An entry that was measured with another version of Triton is not used, because the fastest tile differs between
versions.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["cache_file", "entry_name", "forget", "store", "stored", "triton_version", "trying", "tuned_tile"]

_SIZES = 5  # rows, classes, depth, warps, stages
_VARIABLES = ("LTLOSS_TILES", "XDG_CACHE_HOME", "HOME")  # what the file's place depends on


_tried: dict[str, tuple[int, ...]] = {}


@contextmanager
def trying(kernel: str, tile: tuple[int, ...]) -> Iterator[None]:
    """Within the block, ``kernel`` ("forward" or "gradient", at any size) runs with this tile."""
    _tried[kernel] = tile
    try:
        yield
    finally:
        del _tried[kernel]


def cache_file() -> Path | None:
    """Where tuned tiles are kept, or None where they are switched off."""
    given = os.environ.get("LTLOSS_TILES")
    if given is not None:
        return Path(given) if given else None
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ltloss" / "tiles.json"


def entry_name(kernel: str, arch: int, dtype: object, precision: str) -> str:
    """The key of an entry, for instance ``forward/90/bfloat16/ieee``; the precision only matters for float32."""
    name = str(dtype).removeprefix("torch.")
    return f"{kernel}/{arch}/{name}/{precision if name == 'float32' else 'ieee'}"


@functools.cache
def triton_version() -> str:
    """The version of Triton, found without importing it; empty without one. Cached: it takes half a millisecond."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def stored(file: Path) -> Mapping[str, Any]:
    """The entries of a file, read once per process; none if there is no file, or (with a warning) if it is damaged."""
    try:
        entries = json.loads(file.read_text())
        if not isinstance(entries, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{file} is left out ({error}); write it anew with `ltloss tune`, or remove it", stacklevel=2)
        return {}
    return entries


def tuned_tile(kernel: str, arch: int, dtype: object, precision: str) -> tuple[int, ...] | None:
    """(rows, classes, depth, warps, stages) as measured on this machine, or None where nothing usable is stored."""
    if tried := _tried.get(kernel.partition("_")[0]):
        return tried
    return _looked_up(kernel, arch, dtype, precision, *(os.environ.get(name) for name in _VARIABLES))


@functools.cache
def _looked_up(kernel: str, arch: int, dtype: object, precision: str, *variables: str | None) -> tuple[int, ...] | None:
    """:func:`tuned_tile` from the file, cached per environment: making paths and names takes longer than a launch."""
    file = cache_file()
    entry = None if file is None else stored(file).get(entry_name(kernel, arch, dtype, precision))
    if not isinstance(entry, dict) or entry.get("triton") != triton_version():
        return None
    tile = entry.get("tile")
    if not isinstance(tile, list) or len(tile) != _SIZES or not all(type(size) is int and size > 0 for size in tile):
        return None
    return tuple(tile)


def store(entries: Mapping[str, Any], file: Path) -> None:
    """Add entries to a file, in one step: a reader sees the old file or the new one."""
    # The kernels import nothing of ltloss, so not its module for files; a lost file costs another `ltloss tune`.
    forget()
    merged = {**stored(file), **entries}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(merged, indent=2) + "\n")
    temporary.replace(file)
    forget()


def forget() -> None:
    """Read the files again at the next call."""
    stored.cache_clear()
    _looked_up.cache_clear()
