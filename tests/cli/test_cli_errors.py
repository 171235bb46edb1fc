"""Every mistake in settings or data is one line that says what to do, exit code 2, and nothing written."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cli_errors import TRAIN, fails
from helpers.toys import toy_images

pytestmark = pytest.mark.usefixtures("in_empty_folder")


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (["--batch-size", "0"], ("batch_size", "2", "0")),
        (["--lr", "-0.1"], ("lr", "0", "-0.1")),
        (["--lr", "nan"], ("lr", "0", "nan")),
        (["--lr", "fast"], ("--lr", "float", "'fast'")),
        (["--epochs", "0"], ("epochs", "1", "0")),
        (["--imbalance", "0.5"], ("imbalance", "1", "0.5")),
        (["--imbalance", "1000"], ("imbalance", "146", "1000")),
        (["--momentum", "1"], ("momentum", "[0, 1)", "1.0")),
        (["--image-size", "1"], ("image_size", "4", "1")),
        (["--channels", "2"], ("channels", "1", "3", "2")),
        (["--seed", "-1"], ("seed", "0", "-1")),
        (["--few-threshold", "200"], ("few_threshold", "200", "many_threshold", "100")),
        (["--loss", "softmx"], ("--loss", "'softmx'")),
        (["--loss", "softmax", "--margin", "0.3"], ("softmax", "margin", "0.3")),
        (["--loss", "softmax", "--scale", "16"], ("softmax", "scale", "16.0")),
        (["--loss", "logit-adjusted", "--margin", "1"], ("logit-adjusted", "margin", "tau")),
        (["--loss", "cosface", "--margin", "28.6"], ("cosface", "margin", "[-2, 2]", "28.6")),
        (["--loss", "ldam", "--margin", "28.6"], ("ldam", "max_margin", "[-2, 2]", "28.6")),
        (["--loss", "cosface", "--loss-option", "temperature=2"], ("cosface", "temperature", "2", "sub_centers")),
        (["--loss-option", "margin_normalize=biggest"], ("long-tail", "margin_normalize", "biggest")),
        (["--loss-option", "scale"], ("--loss-option", "'scale'")),
        (["--loss", "cosine-space", "--loss-option", "intra_weight=2"], ("ce_weight", "inter_weight", "intra_weight")),
        (["--backbone", "smallcnn"], ("smallcnn",)),
        (["--augment", "rotate"], ("--augment", "'rotate'")),
        (["--device", "abacus"], ("abacus", "cpu")),
        (["--device", "meta"], ("meta", "cpu", "cuda")),
        (["--device", "mps"], ("mps", "float64", "cpu", "cuda")),
        (["--embedding-size", "1000000000000"], ("--embedding-size",)),
        (["--embedding-size", "1" + "0" * 22], ("embedding_size", "64", "1" + "0" * 22)),
        (["--image-size", "100000"], ("14,380,000,000,000", "--image-size")),
        (["--image-size", "100000000000"], ("1 x 100000000000 x 100000000000", "--image-size")),
        (["--out", ""], ("--out",)),
        (["--config", ""], ("--config",)),
        (["--out", "nul\0byte"], ("NUL",)),
        (["--data", "nul\0byte"], ("NUL",)),
        (["--data", "~nouser/x"], ("~nouser",)),
        (["--device", "cuda:99"], ("cuda:99", "cpu")),
        (["--data", "nowhere"], ("nowhere", "digits")),
        (["--config", "nowhere.toml"], ("--config", "nowhere.toml")),
        (["--colour"], ("--colour",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_option_out_of_range(options: list[str], facts: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    fails([*TRAIN, *options], capsys, *facts)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ([], ("COMMAND",)),
        (["trian"], ("'trian'", "train")),
        (["train", "--data", "digits"], ("--out",)),
        (["train", "--out", "run"], ("--data",)),
        (["train", "--out", "run", "--data", ""], ("--data",)),
        (["compare", "--out", "", "--losses", "all", "--data", "digits"], ("--out",)),
        (["predict", "run", "--images", "", "--out", "results"], ("--images",)),
        (["predict", "run", "--images", "images", "--out", ""], ("--out",)),
        (["predict", "run", "--images", "images", "--out", "results", "--sort-into", ""], ("--sort-into",)),
        (["evaluate", ""], ("RUN",)),
        (["report", ""], ("RUN",)),
        (["evaluate", "nowhere"], ("nowhere",)),
        (["report", "nowhere"], ("nowhere",)),
        (["predict", "nowhere", "--images", "images", "--out", "results"], ("nowhere",)),
    ],
)
def test_command_that_cannot_start(
    arguments: list[str], facts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    fails(arguments, capsys, *facts)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "facts"),
    [
        ("a.toml", "learning-rate = 1", ("learning_rate",)),
        ("a.toml", "batchsize = 1", ("batchsize", "batch_size")),
        ("a.toml", "lr = ", ("a.toml",)),
        ("a.toml", 'lr = "fast"', ("lr", "float", "'fast'")),
        ("a.toml", "epochs = 1.5", ("epochs", "int", "1.5")),
        ("a.toml", "epochs = true", ("epochs", "int", "True")),
        ("a.toml", "loss_options = 3", ("loss_options", "dict", "3")),
        ("a.toml", 'loss = "arc"', ("loss", "'arc'", "arcface")),
        ("a.json", "[1]", ("a.json", "list")),
        ("a.json", '{"lr": 1', ("a.json",)),
        ("a.json", "[" * 200_000, ("a.json",)),
        ("a.json", '{"lr": 1' + "0" * 400 + "}", ()),
    ],
)
def test_bad_settings_file(name: str, text: str, facts: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    Path(name).write_text(text)
    fails(["train", "--config", name, "--data", "digits", "--out", "run"], capsys, *facts)
    assert not Path("run").exists()


def _without_classes(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path)


def _all_corrupt(folder: Path) -> None:
    for path in (folder / "bean").iterdir():
        path.write_bytes(b"\x89PNG but no more")


def _other_classes_in_test(folder: Path) -> None:
    shutil.copytree(folder, folder / "train")
    shutil.copytree(folder / "train", folder / "test")
    for path in list(folder.iterdir()):
        if path.name not in ("train", "test"):
            shutil.rmtree(path)
    (folder / "test" / "corn").rename(folder / "test" / "maize")


@pytest.mark.parametrize(
    ("spoil", "facts"),
    [
        (_without_classes, ("0", "2")),
        (lambda folder: [shutil.rmtree(folder / name) for name in ("apple", "bean")], ("1", "2")),
        (lambda folder: (folder / "empty").mkdir(), ("empty",)),
        (_all_corrupt, ("bean",)),
        (_other_classes_in_test, ("corn", "maize")),
    ],
    ids=["no class", "one class", "empty class", "corrupt class", "other classes in the test split"],
)
def test_folder_that_cannot_be_used(
    spoil: Callable[[Path], object], facts: tuple[str, ...], toy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(toy_folder)
    fails([*TRAIN, "--data", str(toy_folder)], capsys, *facts)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"x_test": None}, ("x_test",)),
        ({"x_train": np.zeros((6, 8, 8), np.float32)}, ("x_train", "uint8", "float32")),
        ({"x_train": np.zeros((6, 3, 8, 8), np.uint8)}, ("x_train", "(N, H, W)", "(6, 3, 8, 8)")),
        ({"x_train": np.zeros((5, 8, 8), np.uint8)}, ("x_train", "5", "y_train", "6")),
        ({"x_train": np.zeros((0, 8, 8), np.uint8), "y_train": np.zeros(0, int)}, ("0", "2")),
        ({"y_train": np.zeros(6)}, ("y_train", "(N,)", "float64")),
        ({"y_train": np.eye(6, dtype=int)}, ("y_train", "(N,)", "int64", "(6, 6)")),
        ({"y_train": np.array([0, 1, 2, 0, -1, 2])}, ("y_train[4]", "-1", "0..2")),
        ({"y_test": np.array([0, 1, 3, 0, 1, 2])}, ("y_test[2]", "3", "0..2")),
        ({"y_train": np.array([0, 3, 2, 0, 3, 2])}, ("1", "4", "1")),
        ({"class_names": np.array(["a", "a", "b"])}, ("class_names",)),
        ({"class_names": np.array(["a", "b"])}, ("y_train[4]", "2", "0..1")),
        ({"y_test": np.array([None] * 6)}, ("data.npz",)),
    ],
    ids=lambda value: "" if isinstance(value, dict) else " ".join(value),
)
def test_npz_that_cannot_be_used(
    change: dict[str, np.ndarray | None], facts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = toy_images(2)
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels, **change}
    np.savez("data.npz", **{name: array for name, array in arrays.items() if array is not None})  # type: ignore[arg-type]
    fails([*TRAIN, "--data", "data.npz"], capsys, *facts)
    assert not Path("run").exists()


class Trap:
    """Unpickling it would leave a file behind."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 and then nothing", pickle.dumps(Trap())], ids=["empty", "cut", "pickle"]
)
def test_file_that_is_no_npz(content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data.npz").write_bytes(content)
    fails([*TRAIN, "--data", "data.npz"], capsys, "data.npz")
    Path("data.zip").write_bytes(content)
    fails([*TRAIN, "--data", "data.zip"], capsys, "data.zip", ".zip")
    assert not Path("trapped").exists()


def test_training_that_diverges(toy_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["train", "--data", str(toy_npz), "--out", "run", "--loss", "softmax", "--lr", "1e30", "--quiet"]
    fails([*line, "--no-embedding-norm", "--device", "cpu"], capsys, "--lr")


def test_image_that_disappears_while_training(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ltloss.training.data.sources import load_data
    from ltloss.training.run import prepare as training_data

    original, lost = training_data.prepare_data, load_data(str(toy_folder), split="train").names[3]

    def prepare(*given: Any) -> object:
        data = original(*given)
        assert lost in data.train.names
        (toy_folder / lost).unlink()
        return data

    monkeypatch.setattr("ltloss.training.run.trainer.prepare_data", prepare)
    fails([*TRAIN, "--data", str(toy_folder)], capsys, lost)


@pytest.mark.parametrize("spec", ["folder", "digits"])
def test_images_too_large_for_the_memory(
    spec: str, toy_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ltloss.training.data.images.machine_memory", lambda: 500_000)
    data = str(toy_folder) if spec == "folder" else spec
    fails([*TRAIN, "--data", data, "--image-size", "600"], capsys, "500,000", "--image-size")
    assert not Path("run").exists()


def test_options_have_no_abbreviations(capsys: pytest.CaptureFixture[str]) -> None:
    fails([*TRAIN[:-2], "--epoch", "1"], capsys, "--epoch 1", "--epochs", "`ltloss train --help`")
