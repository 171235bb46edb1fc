"""Embeddings written into a file, which training takes."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.refusals import missing, refused
from helpers.toys import CLASS_NAMES, write_embeddings
from torch import Tensor

from ltloss.errors import UserError
from ltloss.training.data.sources import load_data
from ltloss.training.predict.embed import data_to_embed, embed, images_to_embed

SHAPE = (1, 8, 8)


class Rows:
    """Sums of the rows of an image, times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def features(self, images: Tensor) -> Tensor:
        return images.float().sum(3)[:, 0] * self.factor


def test_a_folder_of_classes_becomes_data_to_train_on(toy_folder: Path, tmp_path: Path) -> None:
    found = embed(Rows(), images_to_embed(toy_folder, SHAPE), tmp_path / "f.npz", batch_size=7)
    assert (found.samples, found.width, found.classes) == (30, 8, 3)
    images = load_data(str(toy_folder), split="all")
    source = load_data(str(tmp_path / "f.npz"), split="all")
    assert source.class_names == CLASS_NAMES
    assert source.labels.tolist() == images.labels.tolist()
    assert list(source.names) == list(images.names)
    assert isinstance(source.array, np.memmap)  # type: ignore[union-attr]
    assert torch.equal(source.batch(np.arange(30)), Rows().features(images.batch(np.arange(30))))


def test_own_splits_are_kept(toy_npz: Path, tmp_path: Path) -> None:
    embed(Rows(1 / 8), data_to_embed(str(toy_npz), SHAPE), tmp_path / "f.npz", dtype="float16")
    for split in ("train", "test"):
        images, source = (load_data(str(path), split=split) for path in (toy_npz, tmp_path / "f.npz"))  # type: ignore[arg-type]
        assert (list(source.names), source.labels.tolist()) == (list(images.names), images.labels.tolist())
        expected = Rows(1 / 8).features(images.batch(np.arange(len(images)))).half()
        assert torch.equal(source.batch(np.arange(len(source))), expected)


def test_loose_images_have_no_labels(toy_folder: Path, tmp_path: Path) -> None:
    embed(Rows(), images_to_embed(toy_folder / "apple", SHAPE), tmp_path / "f.npz")
    with zipfile.ZipFile(tmp_path / "f.npz") as archive:
        assert set(archive.namelist()) == {"x.npy", "names.npy"}


def test_images_beside_class_folders_are_left_out_with_a_word(
    toy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(toy_folder / "apple" / "000.png", toy_folder)
    assert len(images_to_embed(toy_folder, SHAPE)[""]) == 30
    assert not missing(capsys.readouterr().err, str(toy_folder), "1 image", "class folders")


def test_what_is_refused_leaves_nothing_behind(toy_folder: Path, tmp_path: Path) -> None:
    parts, out = images_to_embed(toy_folder, SHAPE), tmp_path / "out" / "f.npz"
    out.parent.mkdir()
    with refused("apple/000.png", error=UserError):
        embed(Rows(float("inf")), parts, out)
    with refused("--dtype", "float16", "float32", error=UserError):
        embed(Rows(1e3), parts, out, dtype="float16")
    with refused("--batch-size", "0", error=UserError):
        embed(Rows(), parts, out, batch_size=0)
    with refused("--out", ".npz", error=UserError):
        embed(Rows(), parts, out.with_suffix(".npy"))
    assert list(out.parent.iterdir()) == []
    embed(Rows(), parts, out)
    with refused("--out", "--overwrite", error=UserError):
        embed(Rows(), parts, out)
    embed(Rows(2.0), parts, out, overwrite=True)
    assert [path.name for path in out.parent.iterdir()] == ["f.npz"]
    with refused("--images", error=UserError):
        images_to_embed(tmp_path / "none", SHAPE)
    with refused("6", "--data", error=UserError):
        images_to_embed(toy_folder / "apple", (6,))
    with refused("own.npz", "6", "(1, 8, 8)", error=UserError):
        data_to_embed(str(write_embeddings(tmp_path / "own.npz")), SHAPE)
