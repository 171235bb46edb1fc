"""Lists of images: lines of path and label, iNaturalist's JSON, and where the test list is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from helpers.toys import CLASS_NAMES, toy_settings

from ltloss.errors import UserError
from ltloss.training.data.sources import has_own_splits, load_data
from ltloss.training.measure.evaluate import evaluate_run
from ltloss.training.run.trainer import train


def lines(folder: Path, *indices: int, label: str = "{label}") -> str:
    """Of the images at these places of each class, sorted by name."""
    return "".join(
        f"{path.relative_to(folder.parent)} {label.format(label=number)}\n"
        for number, name in enumerate(CLASS_NAMES)
        for path in [sorted((folder / name).iterdir())[i] for i in indices]
    )


@pytest.fixture
def lists(toy_folder: Path, tmp_path: Path) -> Path:
    """A folder with lists of images that lie below ``tmp_path``."""
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "Toy_LT_train.txt").write_text(lines(toy_folder, 0, 1, 2, 3))
    (folder / "Toy_LT_val.txt").write_text(lines(toy_folder, 4))
    (folder / "Toy_LT_test.txt").write_text(lines(toy_folder, 5, 6) + "\n")
    return folder


def load(data: Path, root: Path, split: str, **more: Any) -> Any:
    return load_data(str(data), split=split, image_root=str(root), **more)  # type: ignore[arg-type]


def test_a_training_list_knows_its_test_list(lists: Path, toy_folder: Path, tmp_path: Path) -> None:
    for data in (lists / "Toy_LT_train.txt", lists):
        train, test, both = (load(data, tmp_path, split) for split in ("train", "test", "all"))
        assert (len(train), len(test), len(both)) == (12, 6, 18)
        assert train.class_names == test.class_names == CLASS_NAMES  # each class has a folder of its own
        assert np.bincount(test.labels).tolist() == [2, 2, 2]
        assert has_own_splits(str(data))
    every = load_data(str(toy_folder), split="all")
    place = [f"images/{name}" for name in every.names].index(test.names[3])
    assert torch.equal(test.batch(np.array([3])), every.batch(np.array([place])))
    (lists / "Toy_LT_test.txt").unlink()
    assert len(load(lists, tmp_path, "test")) == 3  # the validation list


@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_a_list_may_begin_with_a_byte_order_mark(suffix: str, toy_folder: Path, tmp_path: Path) -> None:
    text = lines(toy_folder, 0, 1) if suffix == ".txt" else _inaturalist(toy_folder, 0, 1)
    (tmp_path / f"list{suffix}").write_text(text, encoding="utf-8-sig")
    assert len(load_data(str(tmp_path / f"list{suffix}"), split="all")) == 6


def test_a_list_alone_is_split(lists: Path, tmp_path: Path, toy_folder: Path) -> None:
    (lists / "all.txt").write_text(lines(toy_folder, *range(10)))
    train, test = (load(lists / "all.txt", tmp_path, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (24, 6)
    assert not has_own_splits(str(lists / "all.txt"))


def test_paths_may_begin_beside_the_list_and_hold_blanks(toy_folder: Path) -> None:
    for name in CLASS_NAMES:
        (toy_folder / name).rename(toy_folder / f"a {name}")
    names = [f"a {name}/{file.name}" for name in CLASS_NAMES for file in sorted((toy_folder / f"a {name}").iterdir())]
    (toy_folder / "list.txt").write_text("".join(f"{name} {i // 10}\n" for i, name in enumerate(names)))
    assert load_data(str(toy_folder / "list.txt"), split="all").class_names == ("a apple", "a bean", "a corn")


def test_classes_that_share_a_folder_are_numbers(toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(
        "".join(
            f"images/apple/{path.name} {i % 2}\n" for i, path in enumerate(sorted((toy_folder / "apple").iterdir()))
        )
    )
    assert load_data(str(tmp_path / "list.txt"), split="all").class_names == ("0", "1")


def test_classes_whose_paths_have_no_common_beginning_are_numbers(toy_folder: Path, tmp_path: Path) -> None:
    first, second, _ = lines(toy_folder, 0).splitlines()
    (tmp_path / "list.txt").write_text(f"{first}\n{tmp_path / second}\n")
    assert load_data(str(tmp_path / "list.txt"), split="all").class_names == ("0", "1")


def _inaturalist(folder: Path, *indices: int, kinds: tuple[int, ...] = (0, 1, 2)) -> str:
    found = [line.split() for line in lines(folder, *indices).splitlines()]
    return json.dumps(
        {
            "images": [{"id": 100 + i, "file_name": name} for i, (name, _) in enumerate(found)],
            "annotations": [{"image_id": 100 + i, "category_id": 7 * int(c)} for i, (_, c) in enumerate(found)][::-1],
            "categories": [{"id": 7 * c, "name": f"kind {c}"} for c in kinds],
        }
    )


@pytest.mark.parametrize("kinds", [(2, 1, 0), (5, 0, 2, 1)], ids=["another order", "one more"])
def test_categories_of_a_test_file_are_those_of_the_training_file(
    kinds: tuple[int, ...], toy_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "train2018.json").write_text(_inaturalist(toy_folder, 0))
    (tmp_path / "val2018.json").write_text(_inaturalist(toy_folder, 1, kinds=kinds))
    train, test, both = (load_data(str(tmp_path / "train2018.json"), split=split) for split in ("train", "test", "all"))
    assert train.class_names == test.class_names == both.class_names == ("kind 0", "kind 1", "kind 2")
    assert test.labels.tolist() == [2, 1, 0]
    assert both.labels.tolist() == [2, 1, 0, 2, 1, 0]


def test_a_category_that_the_training_file_lacks_is_refused(toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train2018.json").write_text(_inaturalist(toy_folder, 0))
    foreign = _inaturalist(toy_folder, 1).replace('"category_id": 14', '"category_id": 99')
    (tmp_path / "val2018.json").write_text(foreign)
    with refused("val2018.json", "category_id 99", "3 categories", error=UserError):
        load_data(str(tmp_path / "train2018.json"), split="test")


def test_the_json_of_inaturalist(toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train2018.json").write_text(_inaturalist(toy_folder, 0, 1))
    (tmp_path / "val2018.json").write_text(_inaturalist(toy_folder, 2))
    (tmp_path / "test2018.json").write_text(json.dumps({"images": []}))
    train, test = (load_data(str(tmp_path / "train2018.json"), split=split) for split in ("train", "test"))
    assert train.class_names == ("kind 0", "kind 1", "kind 2")
    assert (train.labels.tolist(), test.labels.tolist()) == ([2, 2, 1, 1, 0, 0], [2, 1, 0])
    assert test.names[0].startswith("images/corn/")
    with refused("test2018.json", "annotations", error=UserError):
        load_data(str(tmp_path / "test2018.json"), split="all")


def test_a_run_is_trained_on_lists_and_may_move(lists: Path, tmp_path: Path, toy_folder: Path) -> None:
    given = toy_settings(lists, image_root=str(tmp_path), epochs=1)
    result = train(tmp_path / "run", given, quiet=True)
    assert result.evaluation.metrics.images == 6
    shutil.move(toy_folder, tmp_path / "moved" / "images")
    again = train(tmp_path / "run", {"image_root": str(tmp_path / "moved"), "epochs": 2}, resume=True, quiet=True)
    assert len(again.history) == 2


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("images/apple/000.png\n", ("line 1", "PATH LABEL")),
        ("images/apple/000.png 0\nimages/apple/001.png one\n", ("line 2", "PATH LABEL")),
        ("images/apple/000.png -1\n", ("line 1", "PATH LABEL")),
        ("\n", ("PATH LABEL",)),
        ("images/apple/000.png 0\nimages/bean/010.png 2\nx 2\n", ("1", "3")),
        ("none.png 0\nimages/bean/010.png 1\n", ("none.png", "--image-root")),
    ],
    ids=["no label", "a word", "negative", "empty", "a class without images", "no such image"],
)
def test_lists_that_cannot_be_used(text: str, facts: tuple[str, ...], toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(text)
    with refused("list.txt", *facts, error=UserError):
        load_data(str(tmp_path / "list.txt"), split="all")


def test_what_else_is_refused(lists: Path, tmp_path: Path, toy_folder: Path) -> None:
    with refused("--image-root", "digits", error=UserError):
        load_data("digits", split="all", image_root=str(tmp_path))
    (lists / "Toy_LT_test.txt").write_text(lines(toy_folder, 5, label="3"))
    with refused("Toy_LT_test.txt", "3", "0..2", error=UserError):
        load(lists, tmp_path, "test")
    for name in ("Other_train.txt", "Other_test.txt"):
        shutil.copy(lists / "Toy_LT_train.txt", lists / name)
    with refused("Other_train.txt", "Toy_LT_train.txt", error=UserError):
        load(lists, tmp_path, "train")
    without_a_kind = _inaturalist(toy_folder, 0).replace('{"id": 14, "name": "kind 2"}', "null")
    for text in ("{", without_a_kind):
        (tmp_path / "broken.json").write_text(text)
        with refused("broken.json", error=UserError):
            load_data(str(tmp_path / "broken.json"), split="all")


def test_other_data_do_not_begin_in_the_root_of_the_run(lists: Path, toy_folder: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", toy_settings(lists, image_root=str(tmp_path)), quiet=True)
    moved = tmp_path / "moved"
    shutil.copytree(toy_folder, moved / toy_folder.name)
    here = evaluate_run(tmp_path / "run").metrics
    assert evaluate_run(tmp_path / "run", image_root=str(moved)).metrics == here
    assert evaluate_run(tmp_path / "run", str(toy_folder)).metrics.images == 30
    shutil.copytree(lists, tmp_path / "other")
    with refused("--image-root", str(tmp_path / "other"), error=UserError):
        evaluate_run(tmp_path / "run", str(tmp_path / "other"))
    assert evaluate_run(tmp_path / "run", str(tmp_path / "other"), image_root=str(moved)).metrics == here
