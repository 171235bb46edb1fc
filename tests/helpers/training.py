"""Small data and runs that the training tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers.toys import CLASS_NAMES, toy_images, toy_settings, write_images
from ltloss.training.run.trainer import TrainingResult, train


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The networks here are so small that threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def toy_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "toy.npz")


@pytest.fixture
def toy_folder(tmp_path: Path) -> Path:
    """FOLDER/<class>/*.png: ten images of each of the three classes."""
    folder = tmp_path / "images"
    for index, (image, label) in enumerate(zip(*toy_images(10), strict=True)):
        path = folder / CLASS_NAMES[label] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.fixture(scope="session")
def toy_run(toy_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """A finished run of two epochs. Do not change its files: copy them."""
    return train(tmp_path_factory.mktemp("runs") / "toy", toy_settings(toy_npz), quiet=True)


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(in_empty_folder: None, toy_run: TrainingResult) -> Path:
    """A finished run in an empty working folder."""
    shutil.copytree(toy_run.run, "run")
    return Path("run")
