"""Copy pictures into one folder per class, whatever the classes are called, without ever overwriting a file."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ltloss.training.errors import UserError

__all__ = ["Sorter", "folder_names"]

# Not allowed in a name on Windows (the slash: anywhere), control characters, and bytes that are not text.
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]')
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE | re.DOTALL)
_LONGEST = 120  # bytes of UTF-8; file systems allow 255, some encrypting ones 143


def _shortened(name: str, limit: int) -> str:
    return name.encode("utf-8")[:limit].decode("utf-8", "ignore").rstrip(" .")


def _safe(name: str) -> str:
    safe = _FORBIDDEN.sub("_", unicodedata.normalize("NFC", name)).strip().rstrip(".").rstrip()
    if safe.startswith("."):  # hidden, or the folder above
        safe = "_" + safe.lstrip(".")
    if _RESERVED.fullmatch(safe):
        safe = "_" + safe
    return _shortened(safe, _LONGEST) or "_"


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Return one folder name per class: usable on every common file system and unlike all others, even without case.

    A class whose name is usable keeps it; of several that would share a name, later ones get ``-2``, ``-3``, ...
    """
    candidates = [_safe(name) for name in class_names]
    unchanged_first = sorted(range(len(class_names)), key=lambda c: (candidates[c] != class_names[c], c))
    folders = [""] * len(class_names)
    taken: set[str] = set()
    last_number: dict[str, int] = {}
    for class_index in unchanged_first:
        folder = candidate = candidates[class_index]
        number = last_number.get(candidate.casefold(), 1)
        while folder.casefold() in taken:
            number += 1
            folder = f"{_shortened(candidate, _LONGEST - 8)}-{number}"
        last_number[candidate.casefold()] = number
        taken.add(folder.casefold())
        folders[class_index] = folder
    return folders


class Sorter:
    """Copies pictures to ``root/<folder of the class>/<file name>``; a name in use gets ``-2``, ``-3``, ... appended.

    Args:
        root: the folder to sort into; made when absent.
        class_names: by class index; :func:`folder_names` turns them into folder names.
    """

    def __init__(self, root: Path, class_names: Sequence[str]) -> None:
        self.root = root
        self.class_names = class_names
        self.folders = folder_names(class_names)
        self._last_number: dict[Path, int] = {}  # or the n-th file of one name would try n names

    def copy(self, source: Path, class_index: int) -> Path:
        """Copy ``source`` and return the path of the copy.

        Raises:
            UserError: the class's folder cannot be made, for instance because a file has its name.
            OSError: the copy failed; nothing of it is left behind.
        """
        folder = self.root / self.folders[class_index]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder} for --sort-into: {error.strerror or error}") from error
        target = self._reserve(folder / source.name)
        staging = folder / f".unfinished-{os.getpid()}"
        try:
            shutil.copy2(source, staging)
            staging.replace(target)
        except BaseException:
            staging.unlink(missing_ok=True)
            target.unlink(missing_ok=True)
            raise
        return target

    def _reserve(self, wanted: Path) -> Path:
        """Create the first free name as an empty file: exclusively, so two processes cannot take the same one."""
        stem = os.fsdecode(os.fsencode(wanted.stem)[:200])  # leaves room for the number
        number = self._last_number.get(wanted, 0)
        while True:
            number += 1
            path = wanted if number == 1 else wanted.with_name(f"{stem}-{number}{wanted.suffix}")
            with suppress(FileExistsError):
                path.open("xb").close()
                self._last_number[wanted] = number
                return path
