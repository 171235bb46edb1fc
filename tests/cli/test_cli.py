from __future__ import annotations

import csv
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.refusals import missing
from helpers.toys import CLASS_NAMES

from ltloss.cli.command import main
from ltloss.tools.plan import OPTIMIZERS, WIDTHS
from ltloss.training.comparison.methods import METHODS
from ltloss.training.model.registry import LOSSES
from ltloss.training.run.run_config import RunConfig
from ltloss.training.run.settings import SETTINGS
from ltloss.training.run.trainer import TrainingResult

pytestmark = pytest.mark.slow

SMALL = ["--epochs", "1", "--batch-size", "16", "--embedding-size", "8", "--device", "cpu"]


def test_train_on_digits_then_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    line = ["train", "--data", "digits", "--imbalance", "20", "--loss", "arcface", "--margin", "0.2", "--scale", "16"]
    line += ["--loss-option", "beyond_pi=arcface", "--many-threshold", "40", "--few-threshold", "15", "--out", str(run)]
    assert main([*line, *SMALL, "--epochs", "2"]) == 0
    settings = RunConfig.read(run).settings
    assert (settings.epochs, settings.margin, settings.loss_options["beyond_pi"]) == (2, 0.2, "arcface")
    assert (run / "report.html").is_file()
    shown = capsys.readouterr().out
    assert "many (>40), %" in shown
    assert str(run / "report.html") in shown

    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = list(csv.DictReader((run / "metrics.csv").open()))[-1]
    for name, column in (("accuracy", "test_accuracy"), ("many", "many"), ("few", "few"), ("loss", "test_loss")):
        assert found[name] == float(row[column])
    assert (found["many_above"], found["few_below"], found["pictures"]) == (40, 15, 359)
    assert list(found["per_class"]) == list("0123456789")

    assert main(["evaluate", str(run), "--many-threshold", "1000", "--few-threshold", "2"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[-1] for line in shown.splitlines() if line.startswith(("  many", "  few"))] == ["–", "–"]


def test_train_on_a_folder_with_a_bad_image_and_evaluate_all_of_it(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (toy_folder / "apple" / "bad.png").write_bytes(b"not an image")
    assert main(["train", "--data", str(toy_folder), "--out", str(tmp_path / "run"), "--workers", "2", *SMALL]) == 0
    assert not missing(capsys.readouterr().err, "bad.png")
    config = RunConfig.read(tmp_path / "run")
    assert config.class_names == CLASS_NAMES
    assert config.class_counts == (8, 8, 8)
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(toy_folder), "--split", "all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 30


def test_command_line_wins_over_the_file(toy_npz: Path, tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    config.write_text(f'data = "{toy_npz}"\nlr = 0.01\nepochs = 1\nloss = "cosface"\nmargin = 0.1\nbatch_size = 16\n')
    assert main(["train", "--config", str(config), "--lr", "0.02", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    settings = RunConfig.read(tmp_path / "run").settings
    assert (settings.lr, settings.loss, settings.margin, settings.epochs) == (0.02, "cosface", 0.1, 1)


def test_quiet_says_nothing(toy_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", str(toy_npz), "--out", str(tmp_path / "run"), "--quiet", *SMALL]) == 0
    assert capsys.readouterr() == ("", "")


def test_interrupted_training_keeps_its_checkpoint_and_says_how_to_continue(
    toy_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ltloss.training.run.trainer import Trainer

    original = Trainer.run_epoch

    def interrupted(self: Trainer, epoch: int, *given: object) -> object:
        if epoch == 2:
            raise KeyboardInterrupt
        return original(self, epoch, *given)  # type: ignore[arg-type]

    out = tmp_path / "run"
    line = ["train", "--data", str(toy_npz), "--out", str(out), *SMALL, "--epochs", "3", "--quiet"]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "run_epoch", interrupted)
        assert main(line) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"ltloss train --resume --out {out}" in error
    assert main(["train", "--resume", "--out", str(out), "--quiet"]) == 0
    assert len((out / "metrics.csv").read_text().splitlines()) == 4


def test_resume_of_nothing_starts(toy_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "--data", str(toy_npz), "--out", str(out), "--resume", "--quiet", *SMALL]) == 0
    assert not missing(capsys.readouterr().err, str(out))
    assert (out / "checkpoints" / "epoch-0001").is_dir()


def test_the_report_of_a_training_is_made_on_its_device(
    toy_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("ltloss.training.pages.run_report.write_report", lambda run, **given: asked.append(given))
    assert main(["train", "--data", str(toy_npz), "--out", str(tmp_path / "run"), "--quiet", *SMALL]) == 0
    assert asked == [{"device": "cpu"}]


def test_report_and_predict_are_reached(
    toy_run: TrainingResult, toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(toy_run.run, tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--map", "pca"]) == 0
    assert (tmp_path / "run" / "report.html").is_file()
    assert json.loads((tmp_path / "run" / "map.json").read_text())["method"] == "PCA"
    assert (
        main(
            [
                "predict",
                str(tmp_path / "run"),
                "--images",
                str(toy_folder),
                "--out",
                str(tmp_path / "out"),
                "--top",
                "3",
            ]
        )
        == 0
    )
    assert (tmp_path / "out" / "gallery.html").is_file()
    assert "30 images" in capsys.readouterr().out


def test_help_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name in SETTINGS:
        assert f"--{name.replace('_', '-').replace('loss-options', 'loss-option')}" in shown
    assert "(default: 0.05)" in shown


COMMANDS = ("train", "compare", "evaluate", "predict", "embed", "export", "report", "tune", "plan", "doctor")


@pytest.mark.parametrize("command", [[name] for name in COMMANDS] + [[]])
def test_help_fits_a_terminal_and_says_what_the_command_does(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert "  RUN" not in lines, "it says nothing about RUN"
    assert shown.split("\n\n")[1].endswith("."), "no description between usage and options"


def _help(command: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What --help says of each option, in one line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "1000")  # or a name would be divided at its hyphen
        with pytest.raises(SystemExit):
            main([command, "--help"])
    _, *options = re.split(r"\n  (?=-)", capsys.readouterr().out)
    return {option.split()[0]: " ".join(option.split()) for option in options}


def test_help_of_compare_names_its_methods_and_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    shown = _help("compare", capsys)
    assert not missing(shown["--losses"], *METHODS, "all")
    assert "--seed)" not in shown["--data-seed"]
    assert "(default: 0)" in shown["--data-seed"]
    assert not missing(shown["--amp,"], "--recipe", "CPU")
    assert "--recipe" not in _help("train", capsys)["--amp,"]


def test_help_of_train_names_units_and_what_an_option_takes(capsys: pytest.CaptureFixture[str]) -> None:
    shown = _help("train", capsys)
    assert not missing(shown["--margin"], "radians", "cosine", "cosface", "ldam", "cosine-space")
    assert not missing(shown["--init-from"], "RUN|FILE")


def test_help_of_plan_shows_its_choices(capsys: pytest.CaptureFixture[str]) -> None:
    shown = _help("plan", capsys)
    assert not missing(shown["--dtype"], *WIDTHS)
    assert not missing(shown["--optimizer"], *OPTIMIZERS)
    assert not missing(shown["--loss"], *(name for name in LOSSES if name != "softmax"))
    assert "softmax" not in shown["--loss"]
    assert "--data-groups" in shown
    assert "--data" not in shown


def test_the_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"ltloss {importlib.metadata.version('ltloss')}\n"


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "ltloss", "evaluate", "/nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("ltloss: error: ")
    assert not missing(done.stderr, "/nowhere")
    assert done.stderr.count("\n") == 1
