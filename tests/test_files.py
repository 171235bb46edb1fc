"""A file or folder is whole or absent, whatever moment the writer dies at."""

from __future__ import annotations

import ast
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ltloss._files import (
    new_file,
    new_folder,
    remove_folder,
    remove_leftovers,
    start_folder,
    write_csv,
    write_file,
)

ROOT = Path(__file__).parents[1]


class Killed(BaseException):
    """The process ends here, and tidies nothing up."""


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, function: str, call: int) -> Iterator[None]:
    """Die in the call of that number of a function of ``os``, and in every later one."""
    original, calls = getattr(os, function), 0

    def wrapper(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls > call:
            raise Killed
        return original(*args, **options)

    with monkeypatch.context() as patched, suppress(Killed):
        patched.setattr(os, function, wrapper)
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        patched.setattr(Path, "unlink", lambda *_, **__: None)
        yield


def _folder(target: Path) -> None:
    with new_folder(target) as folder:
        (folder / "deep").mkdir()
        write_file(folder / "one", b"1")
        (folder / "deep" / "two").write_bytes(b"2")


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("function", ["fsync", "replace", "open"])
@pytest.mark.parametrize("call", range(12))
def test_death_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    write_file(file, b"old")
    with dying(monkeypatch, function, call):
        write_file(file, b"new")
    with dying(monkeypatch, function, call):
        _folder(folder)
    assert file.read_bytes() in (b"old", b"new")
    assert not folder.exists() or _contents(folder) == {"one": b"1", "deep/two": b"2"}
    remove_leftovers(tmp_path, "fi", "folder")
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "folder"}


def test_a_removed_folder_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(tmp_path / "folder")
    with dying(monkeypatch, "fsync", 99):
        remove_folder(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    remove_leftovers(tmp_path, "")
    assert not list(tmp_path.iterdir())


def test_two_writers_of_a_file_have_each_their_own(tmp_path: Path) -> None:
    with new_file(tmp_path / "file") as first:
        first.write(b"first")
        with new_file(tmp_path / "file") as second:
            second.write(b"2")
        assert (tmp_path / "file").read_bytes() == b"2"
    assert (tmp_path / "file").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_the_leftovers_of_what_is_named_are_removed(tmp_path: Path) -> None:
    (tmp_path / "notes.tmp").mkdir()
    (tmp_path / "notes.tmp" / "a.txt").write_text("mine")
    with new_file(tmp_path / "model.onnx") as file, new_folder(tmp_path / "epoch-0001"):
        remove_leftovers(tmp_path, "config.json", "epoch-")
        assert not list(tmp_path.glob("*epoch-0001"))
        (tmp_path / file.name).stat()
        start_folder(tmp_path / "epoch-0001")
    assert {path.name for path in tmp_path.iterdir()} == {"notes.tmp", "model.onnx", "epoch-0001"}


def _full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("write", [lambda path: write_file(path, b"new"), _folder], ids=["file", "folder"])
def test_full_disk_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(OSError) as caught:
        write(tmp_path / "wanted")
    assert "wanted" in str(caught.value.filename)
    assert not list(tmp_path.iterdir())


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_file(tmp_path / "absent" / "wanted", b"new")
    assert caught.value.filename == str(tmp_path / "absent" / "wanted")


def test_a_table_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_csv(path, ["a", "b"], [{"a": 1, "b": None}, {"a": 2}, {"b": 3}])
    write_csv(path, ["b"], [{"b": "x,y"}])
    assert path.read_bytes() == b'b\n"x,y"\n'
    assert list(path.parent.iterdir()) == [path]


def _renames(file: Path) -> bool:
    """Whether a module renames files itself: os.replace, os.rename, or a path's own method with one argument."""
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in ("replace", "rename")]
    return any(
        ast.unparse(call.func).startswith(("os.rename", "os.replace")) or (len(call.args) == 1 and not call.keywords)
        for call in named
    )


def test_nobody_else_puts_files_into_place_by_hand() -> None:
    files = [file for place in ("ltloss", "benchmarks", "examples") for file in (ROOT / place).rglob("*.py")]
    found = {file.relative_to(ROOT).as_posix() for file in files if _renames(file)}
    streamed = {"ltloss/interop/safetensors.py"}  # block by block, by all ranks
    # Several names are put into a folder that may be a mount point, and so cannot be renamed.
    merged = {"ltloss/training/predict/output_folder.py", "ltloss/training/predict/sort_images.py"}
    assert found - streamed == {"ltloss/_files.py", *merged}
