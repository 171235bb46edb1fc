"""Write a folder of results at once: complete new files replace complete old ones, or nothing changes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ltloss.errors import UserError
from ltloss.training.run.lock import LOCK, owned

_STAGING = ".unfinished-"


@contextmanager
def output_folder(path: Path, manifest: str, names: Sequence[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder; its files move to ``path`` if the block succeeds, else ``path`` stays as it was.

    A manifest marks a folder of former results. Former results are replaced if ``overwrite`` allows it; other files are
    refused. Files are moved one by one into the existing folder, because a folder that is a mount point cannot be
    renamed.

    Args:
        path: the folder; made when absent.
        manifest: the file name of the manifest, which the block writes.
        names: names of files and folders in ``path`` that results may have; a trailing ``*`` stands for any ending.
        overwrite: whether former results may be replaced.

    Raises:
        UserError: ``path`` is not a folder, cannot be written to, is being written by a living process, holds files
            that are not former results, or holds former results and ``overwrite`` is false.
    """
    known = (*names, manifest)
    _refuse_present_files(path, manifest, known, overwrite)  # before the lock, which would write into a foreign folder
    staging = path / f"{_STAGING}{os.getpid()}"
    with ExitStack() as stack:
        try:
            stack.enter_context(owned(path))
            _refuse_present_files(path, manifest, known, overwrite)  # another process may have published meanwhile
            shutil.rmtree(staging, ignore_errors=True)  # left by a killed process of the same number, as in containers
            staging.mkdir()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write into --out {path}: {reason}; give a writable folder") from error
        try:
            yield staging
            _publish(staging, path, manifest, known)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _is_result(name: str, known: Sequence[str]) -> bool:
    return name.startswith(_STAGING) or any(
        name.startswith(each[:-1]) if each.endswith("*") else name == each for each in known
    )


def _refuse_present_files(path: Path, manifest: str, known: Sequence[str], overwrite: bool) -> None:
    try:
        present = sorted(os.listdir(path)) if path.is_dir() else []
    except OSError as error:
        raise UserError(f"cannot read --out {path}: {error.strerror or error}; give another folder") from error
    if not path.is_dir() and os.path.lexists(path):
        raise UserError(f"--out {path} is a file, a folder was expected; give another name")
    former = manifest in present
    # The lock and the unfinished folders are of a killed process, or of a living one, which `owned` tells.
    foreign = [
        name
        for name in present
        if name != LOCK and not (name.startswith(_STAGING) or (former and _is_result(name, known)))
    ]
    if foreign:
        raise UserError(
            f"--out {path} holds {foreign[0]!r}{' and more' if len(foreign) > 1 else ''}, which no earlier "
            "prediction wrote; give a new or empty folder"
        )
    if former and not overwrite:
        raise UserError(
            f"--out {path} holds the results of an earlier prediction; give --overwrite to replace "
            "them, or a new folder"
        )


def _publish(staging: Path, path: Path, manifest: str, known: Sequence[str]) -> None:
    """Move everything into place, the manifest first; then remove former results that were not replaced."""
    new = sorted(os.listdir(staging), key=lambda name: name != manifest)
    for name in new:
        target = path / name
        if target.is_dir():  # a folder cannot replace a folder that has something in it
            shutil.rmtree(target)
        (staging / name).replace(target)
    for outdated in (path / name for name in os.listdir(path) if _is_result(name, known) and name not in new):
        if outdated.is_dir() and not outdated.is_symlink():
            shutil.rmtree(outdated, ignore_errors=True)
        else:
            outdated.unlink(missing_ok=True)
