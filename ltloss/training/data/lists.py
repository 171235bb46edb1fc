"""Lists of images in common formats: lines of path and label (ImageNet-LT, Places-LT), iNaturalist's JSON."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ltloss.errors import UserError, in_one_line
from ltloss.training.data.images import Split
from ltloss.training.data.labels import check_range, names_of_classes

# Words that replace "train" in the name of the test list, by preference. iNaturalist's test files have no labels.
_TESTS = {".txt": ("test", "val"), ".json": ("val", "test")}

_Classes = dict[object, str]  # category_id -> name, in the order of the labels


@dataclass(frozen=True)
class ImageList:
    """Paths of images with their labels (N,) and the names of the classes."""

    names: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...]


def find_lists(path: Path) -> dict[str, Path] | None:
    """The lists {"train": ..., "test": ...} of a folder or of a training list, or {"all": ...} for a single list.

    None if ``path`` is neither. UserError if a folder holds several training lists.
    """
    if path.is_file():
        if path.suffix not in _TESTS:
            return None
        return _with_test(path) or {"all": path}
    if not path.is_dir():
        return None
    found = [_with_test(file) for file in sorted(path.iterdir()) if file.suffix in _TESTS and "train" in file.name]
    pairs = [pair for pair in found if pair]
    if len(pairs) > 1:
        listed = " and ".join(pair["train"].name for pair in pairs[:2])
        raise UserError(f"{path} holds several training lists, {listed}; give one of them as --data")
    return pairs[0] if pairs else None


def _with_test(train: Path) -> dict[str, Path] | None:
    for word in _TESTS[train.suffix]:
        test = train.with_name(train.name.replace("train", word))
        if test != train and test.is_file():
            return {"train": train, "test": test}
    return None


def read_list(lists: dict[str, Path], split: Split) -> ImageList:
    """The images of a split, or of all splits; the classes are those of the training list.

    UserError names the line or the key that is wrong.
    """
    first = lists.get("train", lists.get("all"))
    assert first is not None
    names, labels, given = _read(first)
    class_names = names_of_classes(first, "the labels", labels, None if given is None else np.array([*given.values()]))
    if given is None:
        class_names = _folder_names(names, labels) or class_names
    if "test" in lists and split != "train":
        test_names, test_labels, _ = _read(lists["test"], given)
        check_range(lists["test"], "the labels", test_labels, len(class_names))
        before = ([], labels[:0]) if split == "test" else (names, labels)
        names, labels = [*before[0], *test_names], np.concatenate([before[1], test_labels])
    return ImageList(names, labels, class_names)


def _read(path: Path, known: _Classes | None = None) -> tuple[list[str], np.ndarray, _Classes | None]:
    """Names, labels, and the classes: the ``known`` ones, else those of the file if it has them."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        of_json = path.suffix == ".json"
        names, labels, given = _of_json(path, json.loads(text), known) if of_json else _of_lines(path, text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({in_one_line(repr(error))}); give a list of images") from error
    if not names:
        raise UserError(f"{path} holds no image; give a file with lines of PATH LABEL")
    return names, np.array(labels, dtype=np.int64), given


def _of_lines(path: Path, text: str) -> tuple[list[str], list[int], None]:
    names, labels = [], []
    for number, line in enumerate(text.splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        if not line.strip():
            continue
        if not name or not label.isdecimal() or len(label) > 18:
            raise UserError(f"{path}, line {number} must be PATH LABEL; got {line[:80]!r}")
        names.append(name.strip())
        labels.append(int(label))
    return names, labels, None


def _of_json(
    path: Path, content: dict[str, list[dict[str, object]]], known: _Classes | None
) -> tuple[list[str], list[int], _Classes]:
    if "annotations" not in content:
        raise UserError(f"{path} has no annotations, so no labels; give a training or validation file")
    # A test file may have other categories, or the same in another order: the numbers are those of the training file.
    classes = _classes(content["categories"]) if known is None else known
    numbers = {identifier: number for number, identifier in enumerate(classes)}
    files = {image["id"]: str(image["file_name"]) for image in content["images"]}
    names = [files[item["image_id"]] for item in content["annotations"]]
    identifiers = [item["category_id"] for item in content["annotations"]]
    for identifier in identifiers:
        if identifier not in numbers:
            raise UserError(
                f"{path}: category_id {in_one_line(repr(identifier), 80)} was given, one of the {len(numbers)} "
                f"categories of the training list was expected: {in_one_line(', '.join(map(repr, numbers)), 80)}"
            )
    return names, [numbers[identifier] for identifier in identifiers], classes


def _classes(categories: list[dict[str, object]]) -> _Classes:
    words = [str(kind.get("name", kind["id"])) for kind in categories]
    identifiers = [kind["id"] for kind in categories]
    if len(set(identifiers)) < len(identifiers):
        raise ValueError("two categories have the same id")
    return dict(zip(identifiers, words if len(set(words)) == len(words) else map(str, identifiers), strict=True))


def _folder_names(names: list[str], labels: np.ndarray) -> tuple[str, ...] | None:
    """The folder of each class, if every class has all its images in one folder of its own; else None.

    None too if they have no common beginning, as absolute and relative paths.
    """
    folders: dict[int, str] = {}
    for name, label in zip(names, labels.tolist(), strict=True):
        if folders.setdefault(label, os.path.dirname(name)) != os.path.dirname(name):
            return None
    found = [folders[label] for label in sorted(folders)]
    if len(set(found)) < len(found) or not all(found):
        return None
    try:
        common = os.path.commonpath(found)
    except ValueError:
        return None
    return tuple(os.path.relpath(folder, common) if common else folder for folder in found)
