"""Files and folders that are either complete or absent, even if the process is killed while it writes them.

Each is written under a temporary name in the same folder, flushed to the disk and then renamed. A reader never sees an
incomplete one, and a full disk leaves the former one as it was. Nobody else has names of this kind, and each writer of
a file has one of its own.
"""

from __future__ import annotations

import csv
import io
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".ltloss-"  # begins the names of what is unfinished


def temporary(path: Path) -> Path:
    """The temporary name, in the same folder, of the folder ``path``: all ranks that fill it derive the same one."""
    return path.with_name(TEMPORARY + path.name)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces ``path`` when the block ends without an error; otherwise ``path`` stays as it was."""
    unfinished = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and str(error.filename or unfinished) == str(unfinished):
            error.filename = str(path)  # a failed write names no file, and nobody knows the temporary one
        raise
    _flush_names(path.parent)


def write_file(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file, at once or in pieces. It holds either its former content or all of the new one."""
    with new_file(path) as file:
        file.writelines([content] if isinstance(content, bytes) else content)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV table. None and missing keys become empty cells."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Make a folder that becomes ``target`` when the block ends without an error; otherwise it is removed."""
    try:
        yield start_folder(target)
        publish_folder(target)
    except BaseException:
        shutil.rmtree(temporary(target), ignore_errors=True)
        raise


def start_folder(target: Path) -> Path:
    """Make the temporary folder of ``target``: the first half of :func:`new_folder`, if several processes fill it."""
    shutil.rmtree(temporary(target), ignore_errors=True)
    temporary(target).mkdir(parents=True)
    return temporary(target)


def publish_folder(target: Path) -> None:
    """Flush the temporary folder to the disk and rename it to ``target``: the second half of :func:`new_folder`."""
    _flush_folder(temporary(target))
    os.replace(temporary(target), target)
    _flush_names(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder. It is renamed first, so that a killed process never leaves half of it under its name."""
    os.replace(folder, temporary(folder))
    shutil.rmtree(temporary(folder))


def remove_leftovers(folder: Path, *names: str) -> None:
    """Remove what a killed process left in ``folder`` of files and folders whose names begin with one of ``names``.

    Only the caller may write these: what a living process has not finished would go too.
    """
    for name in names:
        for path in folder.glob(f"{TEMPORARY}{name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _flush_folder(folder: Path) -> None:
    """Flush the files of a folder, at any depth, and their names to the disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            _flush_names(path)
        else:
            with path.open("r+b") as file:
                os.fsync(file.fileno())
    _flush_names(folder)


def _flush_names(folder: Path) -> None:
    """Make renames in a folder durable. Windows cannot open folders and does not need it."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
