"""A folder of results: complete new files take the place of complete old ones, or nothing changes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType

from ltloss._files import write_file
from ltloss.errors import UserError

__all__ = ["OutputFolder"]

_STAGING = ".unfinished-"


class OutputFolder(AbstractContextManager["OutputFolder"]):
    """Write results into ``staging`` inside a ``with`` block; :meth:`publish` moves them to ``path``.

    The folder carries a manifest, by which its own former results are told from somebody else's files: the former are
    replaced where ``overwrite`` allows it, the latter make the constructor refuse. Leaving the block without publishing
    leaves the folder as it was.
    Files are moved one by one into the existing folder, because a folder that is a mount point cannot be renamed.

    Args:
        path: the folder; made when absent.
        names: the first-level names that results of this kind may have; a trailing ``*`` stands for any ending.
        manifest: the file name of the manifest, a JSON object.
        overwrite: whether former results may be replaced.

    Raises:
        UserError: ``path`` is not a folder, cannot be written to, holds files that are not former results, or
            holds former results and ``overwrite`` is false.
    """

    def __init__(self, path: Path, *, names: tuple[str, ...], manifest: str, overwrite: bool = False) -> None:
        self.path = path
        self._names = (*names, manifest)
        self._manifest = manifest
        self._existed = path.is_dir()
        self.staging = path / f"{_STAGING}{os.getpid()}"
        self._refuse_present_files(overwrite)
        shutil.rmtree(self.staging, ignore_errors=True)  # of a killed process with the same number, usual in containers
        try:
            self.staging.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"cannot write into --out {path}: {error.strerror or error}; give a writable folder"
            ) from error

    def _is_ours(self, name: str) -> bool:
        return name.startswith(_STAGING) or any(
            name.startswith(known[:-1]) if known.endswith("*") else name == known for known in self._names
        )

    def _refuse_present_files(self, overwrite: bool) -> None:
        try:
            present = sorted(os.listdir(self.path)) if self._existed else []
        except OSError as error:
            raise UserError(f"cannot read --out {self.path}: {error.strerror or error}; give another folder") from error
        if not self._existed and os.path.lexists(self.path):
            raise UserError(f"--out {self.path} is a file, a folder was expected; give another name")
        former = self._manifest in present
        foreign = [name for name in present if not (name.startswith(_STAGING) or (former and self._is_ours(name)))]
        if foreign:
            raise UserError(
                f"--out {self.path} holds {foreign[0]!r}{' and more' if len(foreign) > 1 else ''}, which no earlier "
                "prediction wrote; give a new or empty folder"
            )
        if former and not overwrite:
            raise UserError(
                f"--out {self.path} holds the results of an earlier prediction; give --overwrite to replace "
                "them, or a new folder"
            )

    def publish(self, record: Mapping[str, object]) -> None:
        """Move everything from ``staging`` into place, ``record`` as the manifest first; remove what is outdated."""
        write_file(self.staging / self._manifest, (json.dumps(record, indent=2) + "\n").encode())
        new = sorted(os.listdir(self.staging), key=lambda name: name != self._manifest)
        for name in new:
            target = self.path / name
            if target.is_dir():  # a folder cannot replace a folder that has something in it
                shutil.rmtree(target)
            (self.staging / name).replace(target)
        for name in os.listdir(self.path):
            if self._is_ours(name) and name not in new:
                _remove(self.path / name)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        if not self._existed:
            with suppress(OSError):  # not empty: the results were published
                self.path.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
