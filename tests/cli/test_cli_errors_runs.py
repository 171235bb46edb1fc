"""Mistakes about runs that are there already: one line, exit code 2, and the run stays as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.cli_errors import TRAIN, contents, fails

from ltloss.cli.command import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_empty_folder")]


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ([], ("--resume", "--out")),
        (["--resume", "--lr", "0.5", "--epochs", "9"], ("lr", "0.05", "0.5")),
        (["--resume", "--epochs", "1"], ("epochs", "2", "1")),
        (["--resume", "--data", "digits"], ("apple", "bean", "corn", "digits")),
        (["--resume", "--lr", "0"], ("lr", "0", "0.0")),
    ],
)
def test_run_that_is_there_is_not_touched(
    options: list[str], facts: tuple[str, ...], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    fails(["train", "--out", str(run), *(options or ["--data", "digits"])], capsys, *facts)
    assert contents(run) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that is to be missing")
def test_a_device_of_the_run_that_is_not_here_is_named_with_what_to_add(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "config.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    resume = ["train", "--out", str(run), "--resume"]
    fails(resume, capsys, "cuda", "began", "add --device cpu")
    fails([*resume, "--device", "cuda:1"], capsys, "cuda:1", "leave it out")
    assert main([*resume, "--device", "cpu", "--quiet"]) == 0


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_folder_of_something_else_is_not_touched(resume: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("years of work")
    fails([*TRAIN, *resume], capsys, "--out", "run")
    assert contents(Path("run")) == {"thesis.txt": b"years of work"}
    Path("run/thesis.txt").rename("run/thesis.tmp")
    fails([*TRAIN, *resume], capsys, "--out", "run")
    Path("run/thesis.tmp").rename("run/thesis.txt")
    fails([*TRAIN, "--out", "run/thesis.txt"], capsys, "--out", "run/thesis.txt")
    fails([*TRAIN, "--out", "run/thesis.txt/run"], capsys, "run/thesis.txt/run")


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


def _other_dtype(part: str, dtype: torch.dtype) -> Callable[[Path], object]:
    def spoil(run: Path) -> None:
        path = run / f"checkpoints/epoch-0002/{part}.safetensors"
        tensors = safetensors.torch.load_file(path)
        tensors["loss.weight"] = tensors["loss.weight"].to(dtype)
        safetensors.torch.save_file(tensors, path)

    return spoil


def _state(text: str) -> Callable[[Path], object]:
    return lambda run: (run / "checkpoints/epoch-0002/state.json").write_text(text)


def _config(text: str) -> Callable[[Path], object]:
    return lambda run: (run / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "facts"),
    [
        (_other_shape, ("epoch-0002", "loss.weight", "(5, 8)", "(3, 8)")),
        (_other_optimizer, ("optimizer.safetensors", "loss.weight")),
        (_other_dtype("model", torch.int32), ("model.safetensors", "loss.weight", "int32", "float32")),
        (_other_dtype("optimizer", torch.float16), ("optimizer.safetensors", "loss.weight", "float16", "float32")),
        (lambda run: (run / "checkpoints/epoch-0002/state.json").unlink(), ("epoch-0002",)),
        (_state("[]"), ("epoch-0002", "history")),
        (_state("{}"), ("epoch-0002", "history")),
        (_state('{"history": 3}'), ("epoch-0002", "history")),
        (_state('{"history": [3]}'), ("epoch-0002", "history", "1")),
        (_state('{"history": [{"epoch": 1, "lr": "a"}]}'), ("epoch-0002", "history", "1")),
        (_state("[" * 200_000), ("epoch-0002",)),
        (_config("{"), ("config.json",)),
        (_config('{"lr": 1}'), ("config.json", "class_names")),
        (_config("[]"), ("config.json", "class_names")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_checkpoint_that_does_not_fit(
    spoil: Callable[[Path], object], facts: tuple[str, ...], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(run)
    before = contents(run)
    fails(["train", "--resume", "--out", str(run), "--epochs", "3"], capsys, *facts)
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
    fails([command, str(run)], capsys, "config.json", *(name for name in change if change[name] != 10**400))
    assert contents(run) == before


def test_config_of_a_run_that_is_nested_too_deeply(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.json").write_text("[" * 200_000)
    fails(["evaluate", str(run)], capsys, "config.json")


def test_evaluation_on_other_classes_names_them(
    run: Path, toy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (toy_folder / "corn").rename(toy_folder / "maize")
    fails(["evaluate", str(run), "--data", str(toy_folder)], capsys, "corn", "maize")


def test_evaluation_with_groups_that_overlap(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(["evaluate", str(run), "--few-threshold", "500"], capsys, "few_threshold", "500", "many_threshold", "100")


def test_run_without_a_checkpoint_cannot_be_evaluated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    fails(["evaluate", str(run)], capsys, str(run), "--resume")


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
        fails(["train", "--resume", "--out", str(run), "--epochs", "3", "--quiet"], capsys, "--resume")
    assert {name: content for name, content in contents(run).items() if name in before and name != "config.json"} == {
        name: content for name, content in before.items() if name != "config.json"
    }
    assert json.loads((run / "config.json").read_text())["epochs"] in (2, 3)
    assert main(["train", "--resume", "--out", str(run), "--epochs", "3", "--quiet"]) == 0
    assert (run / "checkpoints" / "epoch-0003").is_dir()
