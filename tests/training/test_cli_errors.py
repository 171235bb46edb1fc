"""Every mistake is one line that says what to do, exit code 2, and nothing written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from toys import toy_images

from ltloss.cli import main
from ltloss.training.trainer import TrainingResult

TRAIN = ["train", "--data", "digits", "--out", "run", "--device", "cpu", "--quiet", "--epochs", "1"]
ROOT = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fails(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line ends with code 2 and one line on stderr that matches."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("ltloss: left out")]
    assert len(lines) == 1
    assert lines[0].startswith("ltloss: error: ")
    assert re.search(expected, lines[0]), lines[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
        (["--embedding-size", "1" + "0" * 22], "out of memory; use a smaller --batch-size, --embedding-size"),
        (["--image-size", "100000000000"], "out of memory; .*--image-size"),
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
        (["evaluate", "nowhere"], "nowhere is not a run"),
        (["report", "nowhere"], "nowhere is not a run"),
        (
            ["predict", "nowhere", "--images", "pictures", "--out", "results"],
            "nowhere is not a run|pictures is not a folder",
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
        (lambda folder: (folder / "empty").mkdir(), "empty holds no pictures; add some or remove the folder"),
        (_all_corrupt, "no readable picture for class bean"),
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
        ({"x_train": np.zeros((5, 8, 8), np.uint8)}, "x_train has 5 pictures and y_train 6 labels"),
        ({"x_train": np.zeros((0, 8, 8), np.uint8), "y_train": np.zeros(0, int)}, "0 classes, at least 2"),
        ({"y_train": np.zeros(6)}, r"y_train must be integers of shape \(N,\), is float64"),
        ({"y_train": np.eye(6, dtype=int)}, r"y_train must be integers of shape \(N,\), is int64 of shape \(6, 6\)"),
        ({"y_train": np.array([0, 1, 2, 0, -1, 2])}, r"y_train\[4\] is -1, outside 0..2"),
        ({"y_test": np.array([0, 1, 3, 0, 1, 2])}, r"y_test\[2\] is 3, outside 0..2"),
        ({"y_train": np.array([0, 3, 2, 0, 3, 2])}, "1 of 4 classes have no training picture, the first is 1"),
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


@pytest.fixture
def run(toy_run: TrainingResult) -> Path:
    """A finished run in the working folder."""
    shutil.copytree(toy_run.run, "run")
    return Path("run")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "already holds a run; continue it with --resume, or choose another --out"),
        (["--resume", "--lr", "0.5", "--epochs", "9"], r"other settings: lr \(run: 0.05, now: 0.5\); leave them out"),
        (["--resume", "--epochs", "1"], r"epochs \(run: 2, now: 1\)"),
        (["--resume", "--data", "digits"], "the classes differ: run run has apple, bean, corn which digits lacks"),
        (["--resume", "--lr", "0"], "lr must be greater than 0"),
    ],
)
def test_run_that_is_there_is_not_touched(
    options: list[str], expected: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    fails(["train", "--out", str(run), *(options or ["--data", "digits"])], expected, capsys)
    assert contents(run) == before


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_folder_of_something_else_is_not_touched(resume: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("years of work")
    fails([*TRAIN, *resume], "--out run holds other files", capsys)
    assert contents(Path("run")) == {"thesis.txt": b"years of work"}
    fails([*TRAIN, "--out", "run/thesis.txt"], "is a file; choose a folder", capsys)
    fails([*TRAIN, "--out", "run/thesis.txt/run"], "cannot use run/thesis.txt/run: Not a directory", capsys)


def _other_shape(run: Path) -> None:
    path = run / "checkpoints/epoch-0002/model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["loss.weight"] = torch.zeros(5, 8)
    safetensors.torch.save_file(tensors, path)


def _other_optimizer(run: Path) -> None:
    path = run / "checkpoints/epoch-0002/optimizer.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["loss.weight"]
    safetensors.torch.save_file(tensors, path)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_other_shape, r"epoch-0002.*tensor loss.weight is \(5, 8\) there and \(3, 8\) in the model"),
        (_other_optimizer, r"optimizer.safetensors: tensor loss.weight is missing there"),
        (lambda run: (run / "checkpoints/epoch-0002/state.json").unlink(), "epoch-0002 is damaged"),
        (lambda run: (run / "checkpoints/epoch-0002/state.json").write_text("[]"), "lacks the history"),
        (lambda run: (run / "checkpoints/epoch-0002/state.json").write_text("{}"), "lacks the history"),
        (lambda run: (run / "checkpoints/epoch-0002/state.json").write_text('{"history": 3}'), "lacks the history"),
        (
            lambda run: (run / "checkpoints/epoch-0002/state.json").write_text('{"history": [3]}'),
            "row 1 of the history",
        ),
        (
            lambda run: (run / "checkpoints/epoch-0002/state.json").write_text(
                '{"history": [{"epoch": 1, "lr": "a"}]}'
            ),
            "no number",
        ),
        (lambda run: (run / "checkpoints/epoch-0002/state.json").write_text("[" * 200_000), "epoch-0002 is damaged"),
        (lambda run: (run / "config.json").write_text("{"), "config.json is damaged"),
        (lambda run: (run / "config.json").write_text('{"lr": 1}'), "config.json is damaged"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_checkpoint_that_does_not_fit(
    spoil: Callable[[Path], object], expected: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(run)
    before = contents(run)
    fails(["train", "--resume", "--out", str(run), "--epochs", "3"], expected, capsys)
    assert contents(run) == before


@pytest.mark.parametrize("command", ["evaluate", "report"])
@pytest.mark.parametrize(
    "change",
    [
        {"image_shape": [1, 8]},
        {"image_shape": [2, 8, 8]},
        {"class_counts": [20, 20]},
        {"class_counts": [20, 20, -1]},
        {"mean": None},
        {"mean": [None]},
        {"std": [0]},
        {"class_names": [1, 2, 3]},
        {"class_names": ["a", "a", "b"]},
        {"class_names": []},
        {"versions": []},
        {"lr": 10**400},
        {"lr": "fast"},
    ],
    ids=str,
)
def test_config_of_a_run_that_is_damaged(
    change: dict[str, object], command: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    before = contents(run)
    fails([command, str(run)], rf"config.json is damaged \(.*{next(iter(change))}|too large", capsys)
    assert contents(run) == before


def test_config_of_a_run_that_is_nested_too_deeply(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.json").write_text("[" * 200_000)
    fails(["evaluate", str(run)], "config.json is damaged", capsys)


def test_evaluation_on_other_classes_names_them(
    run: Path, toy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (toy_folder / "corn").rename(toy_folder / "maize")
    fails(["evaluate", str(run), "--data", str(toy_folder)], "run has corn which .* lacks; .* has maize", capsys)


def test_evaluation_with_groups_that_overlap(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(["evaluate", str(run), "--few-below", "500"], "few_below 500 lies above many_above 100", capsys)


def test_run_without_a_checkpoint_cannot_be_evaluated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    fails(["evaluate", str(run)], "has no checkpoint yet; finish an epoch with `ltloss train --resume", capsys)


@pytest.mark.parametrize("written", [0, 1, 4])
def test_full_disk(
    written: int, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    original, count = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count > written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        fails(
            ["train", "--resume", "--out", str(run), "--epochs", "3", "--quiet"],
            r"no space left on the disk while writing( run/\S+)?;.*continue with --resume$",
            capsys,
        )
    assert {name: content for name, content in contents(run).items() if name in before and name != "config.json"} == {
        name: content for name, content in before.items() if name != "config.json"
    }
    assert json.loads((run / "config.json").read_text())["epochs"] in (2, 3)
    assert main(["train", "--resume", "--out", str(run), "--epochs", "3", "--quiet"]) == 0
    assert (run / "checkpoints" / "epoch-0003").is_dir()


def test_training_that_diverges(toy_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["train", "--data", str(toy_npz), "--out", "run", "--loss", "softmax", "--lr", "1e30", "--quiet"]
    fails(
        [*line, "--no-embedding-norm", "--device", "cpu"],
        r"loss is (nan|inf) at step \d+ of .*lower --lr.*--scale",
        capsys,
    )


def test_picture_that_disappears_while_training(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ltloss.training import training_data

    original = training_data.prepare_data

    def prepare(settings: object) -> object:
        data = original(settings)  # type: ignore[arg-type]
        (toy_folder / data.train.names[3]).unlink()
        return data

    monkeypatch.setattr("ltloss.training.trainer.prepare_data", prepare)
    fails([*TRAIN, "--data", str(toy_folder)], "does not exist .*it changed since it was checked, restore it", capsys)


def run_command(*arguments: str, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """`ltloss ARGUMENTS` in a process of its own, after `code`."""
    program = f"import sys\n{code}\nfrom ltloss.cli import main\nsys.exit(main({list(arguments)!r}))"
    everything = {**os.environ, "PYTHONPATH": ROOT, **environment}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=everything)


@pytest.mark.parametrize("module", ["PIL", "safetensors", "matplotlib", "tqdm", "sklearn"])
def test_missing_package_is_named_before_anything_is_written(module: str) -> None:
    done = run_command(*TRAIN, code=f"sys.modules[{module!r}] = None")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"ltloss: error: {module} cannot be imported")
    assert done.stderr.endswith("run: pip install 'ltloss[train]'\n")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("arguments", [["evaluate", "run"], ["report", "run"], ["predict", "run", "--images", "run"]])
def test_other_commands_name_a_missing_package_too(arguments: list[str], run: Path) -> None:
    before = contents(run)
    arguments = [*arguments, "--out", "out"] if arguments[0] == "predict" else arguments
    done = run_command(*arguments, code="sys.modules['safetensors'] = None")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "pip install 'ltloss[train]'" in done.stderr
    assert contents(run) == before
    assert not Path("out").exists()


def test_forced_kernels_without_a_gpu() -> None:
    done = run_command(*TRAIN, LTLOSS_BACKEND="triton", CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "triton" in done.stderr


def test_characters_that_the_terminal_lacks_are_escaped(run: Path) -> None:
    done = run_command("evaluate", "run", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u2013" in done.stdout


def test_a_closed_pipe_ends_quietly(run: Path) -> None:
    code = "import os\nreader, writer = os.pipe()\nos.close(reader)\nos.dup2(writer, 1)"
    done = run_command("evaluate", "run", code=code)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_behind_stdout_does_not_advise_what_the_command_lacks(run: Path) -> None:
    done = run_command("evaluate", "run", code="import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.endswith("Free some space, then run the command again\n")


def test_interrupted_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ltloss.training.trainer.prepare_data", interrupted)
    assert main(TRAIN) == 130
    assert capsys.readouterr().err == "ltloss: interrupted before anything was written\n"
    monkeypatch.setattr("ltloss.cli._parser", interrupted)
    assert main(TRAIN) == 130
    assert capsys.readouterr().err == "ltloss: interrupted\n"


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object, **__: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr("ltloss.training.trainer.prepare_data", defect)
    with pytest.raises(ValueError, match="a defect"):
        main(TRAIN)
