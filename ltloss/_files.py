"""Files and folders that are either whole or absent, whatever moment the process dies at.

Each is written under a temporary name beside its own, flushed to the disk and then renamed. A reader never sees half of
one, and a full disk leaves the former one as it was.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".tmp"


def temporary(path: Path) -> Path:
    """The name beside ``path`` under which it is written."""
    return path.with_name(path.name + TEMPORARY)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into; when the block ends well it takes the place of ``path``, which else stays as it was."""
    try:
        with temporary(path).open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary(path), path)
    except BaseException as error:
        temporary(path).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a failed write does not name its file
        raise
    _flush_names(path.parent)


def write_file(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file, at once or in pieces; it holds either its former content or all of the new one."""
    with new_file(path) as file:
        file.writelines([content] if isinstance(content, bytes) else content)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table whole; None and what a row lacks are empty cells."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder to write into, which becomes ``target`` when the block ends well, and goes when it does not."""
    try:
        yield start_folder(target)
        publish_folder(target)
    except BaseException:
        shutil.rmtree(temporary(target), ignore_errors=True)
        raise


def start_folder(target: Path) -> Path:
    """The first half of :func:`new_folder`, for several processes that fill one folder."""
    shutil.rmtree(temporary(target), ignore_errors=True)
    temporary(target).mkdir(parents=True)
    return temporary(target)


def publish_folder(target: Path) -> None:
    """The second half: flush everything, then give the folder its name."""
    _flush_folder(temporary(target))
    os.replace(temporary(target), target)
    _flush_names(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder; renamed first, for a process killed on the way must not leave half of it under its name."""
    os.replace(folder, temporary(folder))
    shutil.rmtree(temporary(folder))


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left in ``folder`` under temporary names."""
    for path in folder.glob(f"*{TEMPORARY}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _flush_folder(folder: Path) -> None:
    """Put the files of a folder, at any depth, and their names on the disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            _flush_names(path)
        else:
            with path.open("r+b") as file:
                os.fsync(file.fileno())
    _flush_names(folder)


def _flush_names(folder: Path) -> None:
    """Make renames in a folder durable; Windows cannot open folders and does not need it."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
