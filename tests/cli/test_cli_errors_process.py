"""Mistakes that only a whole process shows: missing packages, closed pipes, full disks, interrupts."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from helpers.cli_errors import TRAIN, contents, run_command
from helpers.refusals import missing

from ltloss.cli.command import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_empty_folder")]


@pytest.mark.parametrize("module", ["PIL", "safetensors", "matplotlib", "tqdm", "sklearn"])
def test_missing_package_is_named_before_anything_is_written(module: str) -> None:
    done = run_command(*TRAIN, code=f"sys.modules[{module!r}] = None")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert not missing(done.stderr, module, "ltloss[train]")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("arguments", [["evaluate", "run"], ["report", "run"], ["predict", "run", "--images", "run"]])
def test_other_commands_name_a_missing_package_too(arguments: list[str], run: Path) -> None:
    before = contents(run)
    arguments = [*arguments, "--out", "out"] if arguments[0] == "predict" else arguments
    done = run_command(*arguments, code="sys.modules['safetensors'] = None")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert not missing(done.stderr, "safetensors", "ltloss[train]")
    assert contents(run) == before
    assert not Path("out").exists()


def test_forced_kernels_without_a_gpu() -> None:
    done = run_command(*TRAIN, LTLOSS_BACKEND="triton", CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert not missing(done.stderr, "'triton'")


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
    assert "--resume" not in done.stderr


def test_interrupted_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ltloss.training.run.trainer.prepare_data", interrupted)
    assert main(TRAIN) == 130
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", interrupted)
    assert main(TRAIN) == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert list(Path().iterdir()) == []


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    defect = ValueError("a defect")

    def broken(*_: object, **__: object) -> None:
        raise defect

    monkeypatch.setattr("ltloss.training.run.trainer.prepare_data", broken)
    with pytest.raises(ValueError) as caught:
        main(TRAIN)
    assert caught.value is defect
