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
        (lambda run: (run / "config.json").write_text('{"lr": 1}'), r"config.json is damaged \(it lacks class_names\)"),
        (lambda run: (run / "config.json").write_text("[]"), r"config.json is damaged \(it lacks class_names\)"),
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
