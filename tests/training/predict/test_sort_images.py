"""Sorted copies: all or none, none half written, and one of each image however often it is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.refusals import refused

from ltloss.errors import UserError
from ltloss.training.predict import sort_images
from ltloss.training.predict.sort_images import Sorter

CLASSES = ("cat", "dog")


class Killed(BaseException):
    """The process ends here, and tidies nothing up."""


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Six images: three of one name, two of these alike, and three of other names."""
    names = ["a/same.png", "b/same.png", "c/same.png", "same-2.png", "x.png", "y.png"]
    content = [b"one", b"two", b"two", b"three", b"x", b"y"]
    for name, bytes_ in zip(names, content, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes_)
    return [tmp_path / name for name in names]


def _sort(root: Path, images: list[Path]) -> list[Path]:
    return Sorter(root, CLASSES).sort(images, [number % 2 for number in range(len(images))])


def _check_one_copy_each(root: Path, images: list[Path]) -> None:
    assert sorted(_contents(root).values()) == sorted(path.read_bytes() for path in images)


def test_a_repeat_makes_no_second_copies(tmp_path: Path, images: list[Path]) -> None:
    root = tmp_path / "sorted"
    copies = _sort(root, images)
    before = _contents(root)
    assert [copy.read_bytes() for copy in copies] == [image.read_bytes() for image in images]
    assert _sort(root, images) == copies
    assert _contents(root) == before
    copies[1].unlink()  # one that is gone is made again, under the name that it had
    assert _sort(root, images) == copies
    assert _contents(root) == before


def test_a_copy_that_was_edited_stays_and_another_is_made(tmp_path: Path, images: list[Path]) -> None:
    root = tmp_path / "sorted"
    edited = _sort(root, images)[0]
    edited.write_bytes(b"mine")
    again = _sort(root, images)
    assert edited.read_bytes() == b"mine"
    assert len(_contents(root)) == len(images) + 1
    assert len(set(again)) == len(images)
    assert [copy.read_bytes() for copy in again] == [image.read_bytes() for image in images]


@pytest.mark.parametrize("function", ["copy2", "link"])
@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize("hard_links", [True, False])
def test_death_at_any_step(
    tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch, function: str, call: int, hard_links: bool
) -> None:
    calls = 0

    def dying(original: Callable[..., object]) -> Callable[..., object]:
        def wrapper(source: Path, target: Path, *args: object) -> object:
            nonlocal calls
            calls += 1
            if calls > call:
                Path(target).write_bytes(source.read_bytes()[:1]) if original is shutil.copy2 else None
                raise Killed
            if original is os.link and not hard_links:
                raise PermissionError(1, "no links here")
            return original(source, target, *args)

        return wrapper

    root, owner = tmp_path / "sorted", shutil if function == "copy2" else os
    with monkeypatch.context() as patched, suppress(Killed):
        patched.setattr(owner, function, dying(getattr(owner, function)))
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        patched.setattr(Path, "unlink", lambda *_, **__: None)
        _sort(root, images)
    whole = {image.read_bytes() for image in images}
    assert {path.read_bytes() for path in root.glob("[!.]*/*")} <= whole
    _sort(root, images)
    _check_one_copy_each(root, images)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["copy2", "link"])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_leaves_the_folder_as_it_was(
    tmp_path: Path,
    images: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    function: str,
    existed: bool,
) -> None:
    root, calls = tmp_path / "sorted", 0
    if existed:
        (root / "cat").mkdir(parents=True)
        (root / "cat" / "same.png").write_bytes(b"mine")
    owner = shutil if function == "copy2" else os
    original = getattr(owner, function)

    def failing(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls >= 4:
            raise error
        return original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(owner, function, failing)
        patched.setattr(os, "rename", failing)  # what is tried where there are no hard links
        with pytest.raises(type(error)):
            _sort(root, images)
    assert root.exists() == existed
    assert not existed or _contents(root) == {"cat/same.png": b"mine"}
    assert not existed or [path.name for path in root.iterdir()] == ["cat"]


def test_a_file_in_the_place_of_a_class_is_refused_before_anything_is_copied(
    tmp_path: Path, images: list[Path]
) -> None:
    root = tmp_path / "sorted"
    root.mkdir()
    (root / "dog").write_bytes(b"no folder")
    with refused(str(root / "dog"), error=UserError):
        _sort(root, images)
    assert _contents(root) == {"dog": b"no folder"}


def test_what_a_living_process_writes_stays(tmp_path: Path, images: list[Path]) -> None:
    root = tmp_path / "sorted"
    with sort_images.owned(root / ".unfinished-1"):
        (root / ".unfinished-2").mkdir()
        _sort(root, images)
        assert sorted(path.name for path in root.glob(".*")) == [".unfinished-1"]
