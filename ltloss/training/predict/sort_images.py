"""Copy images into one folder per class: all or none, no image twice, and no file is ever overwritten."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from ltloss.errors import UserError
from ltloss.training.run.lock import owned, refuse_if_written

# Characters not allowed in a file name on Windows (the slash: on any system), control characters, and bytes that are
# not text.
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]')
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE | re.DOTALL)
_NUMBERED = re.compile(r"(.+)-[0-9]+", re.DOTALL)
_UNFINISHED = ".unfinished-"
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
    """One folder name per class: valid on every common file system, and unique even if case is ignored.

    A class whose name is valid keeps it. Of several that would share a name, later ones get ``-2``, ``-3``, ...
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
    """Copies images to ``root/<folder of the class>/<file name>``; a name in use gets ``-2``, ``-3``, ... appended.

    Args:
        root: the folder to sort into; made when absent.
        class_names: by class index; :func:`folder_names` turns them into folder names.
    """

    def __init__(self, root: Path, class_names: Sequence[str]) -> None:
        self.root = root
        self.class_names = class_names
        self.folders = folder_names(class_names)
        self._staging = root / f"{_UNFINISHED}{os.getpid()}"

    def sort(self, images: Sequence[Path], classes: Iterable[int]) -> list[Path]:
        """Copy every image into the folder of its class and return the paths of the copies.

        A file with the image's content and name, up to an appended number, counts as its copy, so that a repeated call
        makes no second one. New copies appear when all of them are complete. No file is overwritten.

        Raises:
            UserError: a folder cannot be made, for instance because a file has its name.
            OSError: a copy failed; the folder is then as it was.
        """
        wanted = [self.root / self.folders[c] / image.name for image, c in zip(images, classes, strict=True)]
        folders = {path.parent for path in wanted}
        existed = self.root.is_dir()
        _make(self._staging)
        try:
            with owned(self._staging):
                self._remove_leftovers()
                earlier = {folder: _EarlierCopies(folder) for folder in folders if folder.is_dir()}
                copies: list[Path | None] = []
                for number, (image, path) in enumerate(zip(images, wanted, strict=True)):
                    copies.append(earlier[path.parent].take(image) if path.parent in earlier else None)
                    if copies[-1] is None:
                        shutil.copy2(image, self._staging / str(number))
                return self._publish(wanted, copies)
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            if not existed:
                with suppress(OSError):  # not empty: the copies are there
                    self.root.rmdir()

    def _remove_leftovers(self) -> None:
        """Remove what killed processes left. A living process holds a lock, and its files stay."""
        for folder in self.root.glob(f"{_UNFINISHED}*"):
            with suppress(UserError):
                refuse_if_written(folder)
                shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, wanted: Sequence[Path], copies: Sequence[Path | None]) -> list[Path]:
        """Move the copies to their names: all, or none if one fails."""
        made: list[Path] = []
        last: dict[Path, int] = {}  # without it the n-th file of one name would try n names
        placed = []
        try:
            for number, (path, copy) in enumerate(zip(wanted, copies, strict=True)):
                if copy is None:
                    if not path.parent.is_dir():
                        _make(path.parent)
                        made.append(path.parent)
                    copy = _place(self._staging / str(number), path, last)
                    made.append(copy)
                placed.append(copy)
        except BaseException:
            for path in reversed(made):
                with suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink()
            raise
        return placed


class _EarlierCopies:
    """The files of a folder by name without number and by size: candidates for a copy made before."""

    def __init__(self, folder: Path) -> None:
        self._found: dict[tuple[str, int], list[Path]] = {}
        self._taken: set[Path] = set()
        for entry in sorted(os.scandir(folder), key=lambda entry: (len(entry.name), entry.name)):
            if entry.is_file(follow_symlinks=False):
                path = Path(entry.path)
                numbered = _NUMBERED.fullmatch(path.stem)
                for stem in {path.stem, numbered[1] if numbered else path.stem}:
                    key = _cut(stem) + path.suffix, entry.stat().st_size
                    self._found.setdefault(key, []).append(path)

    def take(self, image: Path) -> Path | None:
        """A copy of ``image`` that was not returned before, or None."""
        found = self._found.get((_cut(image.stem) + image.suffix, image.stat().st_size), [])
        for path in found:
            if path not in self._taken and filecmp.cmp(image, path, shallow=False):
                self._taken.add(path)
                found.remove(path)
                return path
        return None


def _cut(stem: str) -> str:
    """The first 200 bytes of a name, so that there is room for a number."""
    return os.fsdecode(os.fsencode(stem)[:200])


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} for --sort-into: {error.strerror or error}") from error


def _place(staged: Path, wanted: Path, last: dict[Path, int]) -> Path:
    """Give a file the first free name of its series; two processes cannot take the same one."""
    while True:
        number = last[wanted] = last.get(wanted, 0) + 1
        path = wanted if number == 1 else wanted.with_name(f"{_cut(wanted.stem)}-{number}{wanted.suffix}")
        with suppress(FileExistsError):
            try:
                os.link(staged, path)
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links
                if os.path.lexists(path):
                    continue
                os.rename(staged, path)
            return path
