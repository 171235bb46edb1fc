"""Every mistake in settings or data is one line that says what to do, exit code 2, and nothing written."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.cli_errors import TRAIN, fails
from helpers.toys import toy_images

pytestmark = pytest.mark.usefixtures("in_empty_folder")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--batch-size", "0"], "batch_size must be at least 2, is 0"),
        (["--lr", "-0.1"], "lr must be greater than 0, is -0.1"),
        (["--lr", "nan"], "lr must be greater than 0, is nan"),
        (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["--epochs", "0"], "epochs must be at least 1, is 0"),
        (["--imbalance", "0.5"], "imbalance must be at least 1"),
        (["--imbalance", "1000"], "use at most 146"),
        (["--momentum", "1"], r"momentum must be in \[0, 1\)"),
        (["--image-size", "1"], "image_size must be at least 4"),
        (["--channels", "2"], "channels must be 1 or 3, is 2"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--few-below", "200"], "few_below 200 lies above many_above 100"),
        (["--loss", "softmx"], "--loss: invalid choice: 'softmx'"),
        (["--loss", "softmax", "--margin", "0.3"], r"loss softmax has no option margin \(given: 0.3\); remove it"),
        (["--loss", "softmax", "--scale", "16"], "loss softmax has no option scale"),
        (["--loss", "logit-adjusted", "--margin", "1"], "no option margin.*Its options are:.*tau"),
        (["--loss", "cosface", "--loss-option", "temperature=2"], "loss cosface has no option temperature"),
        (["--loss-option", "margin_normalize=biggest"], "loss long-tail with .*margin_normalize.*biggest"),
        (["--loss-option", "scale"], "'scale' is not NAME=VALUE"),
        (["--loss", "cosine-space", "--loss-option", "intra_weight=2"], "ce_weight > inter_weight > intra_weight"),
        (["--backbone", "smallcnn"], "smallcnn"),
        (["--augment", "rotate"], "--augment: invalid choice"),
        (["--device", "abacus"], "device abacus cannot be used.*use cpu"),
        (["--device", "meta"], "device meta cannot be used .not cpu, cuda or mps.; use cpu"),
        (["--embedding-size", "1000000000000"], "out of memory; use a smaller --batch-size, --embedding-size"),
        (["--embedding-size", "1" + "0" * 22], "embedding_size must have at most 64 bits, is 10000000000000000000000"),
        (
            ["--image-size", "100000"],
            r"at least 14,380,000,000,000 bytes, more than the [\d,]+ of this machine; .*--image-size",
        ),
        (["--image-size", "100000000000"], "images of 1 x 100000000000 x .* bytes.*--image-size"),
        (["--out", ""], "--out: an empty path"),
        (["--config", ""], "--config: an empty path"),
        (["--out", "nul\0byte"], "a path holds a NUL byte"),
        (["--data", "nul\0byte"], "a path holds a NUL byte|NUL|does not exist"),
        (["--data", "~nouser/x"], "~"),
        (["--device", "cuda:99"], "device cuda:99 cannot be used.*use cpu"),
        (["--data", "nowhere"], "'.*nowhere' does not exist; give digits, a folder"),
        (["--config", "nowhere.toml"], "--config nowhere.toml does not exist"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_option_out_of_range(options: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    fails([*TRAIN, *options], expected, capsys)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--data", "digits"], "required: --out"),
        (["train", "--out", "run"], "--data is missing"),
        (["train", "--out", "run", "--data", ""], "--data is missing"),
        (["compare", "--out", "", "--losses", "all", "--data", "digits"], "--out: an empty path"),
        (["predict", "run", "--images", "", "--out", "results"], "--images: an empty path"),
        (["predict", "run", "--images", "images", "--out", ""], "--out: an empty path"),
        (
            ["predict", "run", "--images", "images", "--out", "results", "--sort-into", ""],
            "--sort-into: an empty path",
        ),
        (["evaluate", ""], "RUN: an empty path"),
        (["report", ""], "RUN: an empty path"),
        (["evaluate", "nowhere"], "nowhere is not a run"),
        (["report", "nowhere"], "nowhere is not a run"),
        (
            ["predict", "nowhere", "--images", "images", "--out", "results"],
            "nowhere is not a run|images is not a folder",
        ),
    ],
)
def test_command_that_cannot_start(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    fails(arguments, expected, capsys)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.toml", "learning-rate = 1", "unknown setting learning_rate; "),
        ("a.toml", "batchsize = 1", "unknown setting batchsize; did you mean batch_size"),
        ("a.toml", "lr = ", "cannot be read"),
        ("a.toml", 'lr = "fast"', "lr must be of type float, is 'fast'"),
        ("a.toml", "epochs = 1.5", "epochs must be of type int, is 1.5"),
        ("a.toml", "epochs = true", "epochs must be of type int, is True"),
        ("a.toml", "loss_options = 3", "loss_options must be of type dict, is 3"),
        ("a.toml", 'loss = "arc"', "loss 'arc' is unknown; did you mean arcface"),
        ("a.json", "[1]", "holds a list"),
        ("a.json", '{"lr": 1', "cannot be read"),
        ("a.json", "[" * 200_000, "cannot be read .*; correct the file"),
        ("a.json", '{"lr": 1' + "0" * 400 + "}", "a number beyond every range"),
    ],
)
def test_bad_settings_file(name: str, text: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(name).write_text(text)
    fails(["train", "--config", name, "--data", "digits", "--out", "run"], expected, capsys)
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
    ("spoil", "expected"),
    [
        (_without_classes, "has 0 class sub-folders, at least 2 are needed"),
        (lambda folder: [shutil.rmtree(folder / name) for name in ("apple", "bean")], "has 1 class sub-folders"),
        (lambda folder: (folder / "empty").mkdir(), "empty holds no images; add some or remove the folder"),
        (_all_corrupt, "no readable image for class bean"),
        (_other_classes_in_test, "the classes differ: .*train has corn which .*test lacks; .*test has maize"),
    ],
    ids=["no class", "one class", "empty class", "corrupt class", "other classes in the test split"],
)
def test_folder_that_cannot_be_used(
    spoil: Callable[[Path], object], expected: str, toy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(toy_folder)
    fails([*TRAIN, "--data", str(toy_folder)], expected, capsys)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"x_test": None}, "lacks x_test; it needs x_train, y_train, x_test, y_test"),
        ({"x_train": np.zeros((6, 8, 8), np.float32)}, "x_train must be uint8 .* is float32"),
        ({"x_train": np.zeros((6, 3, 8, 8), np.uint8)}, r"x_train must be \(N, H, W\) or .* is \(6, 3, 8, 8\)"),
        ({"x_train": np.zeros((5, 8, 8), np.uint8)}, "x_train has 5 images and y_train 6 labels"),
        ({"x_train": np.zeros((0, 8, 8), np.uint8), "y_train": np.zeros(0, int)}, "0 classes, at least 2"),
        ({"y_train": np.zeros(6)}, r"y_train must be integers of shape \(N,\), is float64"),
        ({"y_train": np.eye(6, dtype=int)}, r"y_train must be integers of shape \(N,\), is int64 of shape \(6, 6\)"),
        ({"y_train": np.array([0, 1, 2, 0, -1, 2])}, r"y_train\[4\] is -1, outside 0..2"),
        ({"y_test": np.array([0, 1, 3, 0, 1, 2])}, r"y_test\[2\] is 3, outside 0..2"),
        ({"y_train": np.array([0, 3, 2, 0, 3, 2])}, "1 of 4 classes have no training image, the first is 1"),
        ({"class_names": np.array(["a", "a", "b"])}, "class_names must be a list of different strings"),
        ({"class_names": np.array(["a", "b"])}, r"y_train\[4\] is 2, outside 0..1"),
        ({"y_test": np.array([None] * 6)}, "cannot be read .*allow_pickle=False"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_npz_that_cannot_be_used(
    change: dict[str, np.ndarray | None], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = toy_images(2)
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels, **change}
    np.savez("data.npz", **{name: array for name, array in arrays.items() if array is not None})  # type: ignore[arg-type]
    fails([*TRAIN, "--data", "data.npz"], expected, capsys)
    assert not Path("run").exists()


class Trap:
    """Unpickling it would leave a file behind."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04 and then nothing", "cannot be read"),
        (pickle.dumps(Trap()), "cannot be read"),
    ],
    ids=["empty", "cut", "pickle"],
)
def test_file_that_is_no_npz(content: bytes, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data.npz").write_bytes(content)
    fails([*TRAIN, "--data", "data.npz"], expected, capsys)
    Path("data.zip").write_bytes(content)
    fails([*TRAIN, "--data", "data.zip"], "is a .zip file", capsys)
    assert not Path("trapped").exists()


def test_training_that_diverges(toy_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["train", "--data", str(toy_npz), "--out", "run", "--loss", "softmax", "--lr", "1e30", "--quiet"]
    fails(
        [*line, "--no-embedding-norm", "--device", "cpu"],
        r"loss is (nan|inf) at step \d+ of .*lower --lr.*--scale",
        capsys,
    )


def test_image_that_disappears_while_training(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ltloss.training.run import prepare as training_data

    original = training_data.prepare_data

    def prepare(settings: object) -> object:
        data = original(settings)  # type: ignore[arg-type]
        (toy_folder / data.train.names[3]).unlink()
        return data

    monkeypatch.setattr("ltloss.training.run.trainer.prepare_data", prepare)
    fails([*TRAIN, "--data", str(toy_folder)], "does not exist .*it changed since it was checked, restore it", capsys)


@pytest.mark.parametrize("spec", ["folder", "digits"])
def test_images_too_large_for_the_memory(
    spec: str, toy_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ltloss.training.data.images.machine_memory", lambda: 500_000)
    data = str(toy_folder) if spec == "folder" else spec
    fails([*TRAIN, "--data", data, "--image-size", "600"], r" bytes, more than the 500,000 of this machine", capsys)
    assert not Path("run").exists()


def test_options_have_no_abbreviations(capsys: pytest.CaptureFixture[str]) -> None:
    fails([*TRAIN[:-2], "--epoch", "1"], "unrecognized arguments: --epoch 1", capsys)
