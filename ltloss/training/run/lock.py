"""A lock on a run folder: one process at a time writes it, and a second one is told which."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ltloss.errors import UserError

LOCK = ".lock"


def refuse_if_written(folder: Path) -> None:
    """Raise UserError if a living process owns ``folder``. Writes nothing."""
    with suppress(FileNotFoundError, NotADirectoryError):
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
        try:
            if not _locked(descriptor, shared=True):  # others may look at the same moment
                raise _being_written(folder)
        finally:
            os.close(descriptor)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own ``folder`` within the block, and make it if it is absent; UserError if a living process owns it.

    The operating system releases the lock when its owner ends in any way, so a file that was left behind locks nothing.
    The file holds the owner's process id and host, for the message to a process that is refused.
    """
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor = _acquire(path, folder)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if not existed:
            with suppress(OSError):  # not empty: something was written
                folder.rmdir()


def _acquire(path: Path, folder: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _locked(descriptor):
            os.close(descriptor)
            raise _being_written(folder)
        # A former owner may have removed the file between open and lock: then this lock is on a removed file.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def _locked(descriptor: int, *, shared: bool = False) -> bool:
    """Take the lock without waiting, and return whether it was free; always True on Windows, which has no such lock."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _being_written(folder: Path) -> UserError:
    owner = "another process"
    with suppress(OSError):
        owner = (folder / LOCK).read_text(encoding="utf-8", errors="replace").strip() or owner
    return UserError(f"{folder} is being written by {owner}; wait until it ends, or choose another --out")
