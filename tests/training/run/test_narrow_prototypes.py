"""`--prototype-dtype`, `--state-dtype` and `--rounding`: the run, its files, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli_errors import TRAIN, fails
from helpers.toys import toy_settings
from safetensors.torch import load_file

from ltloss.cli.command import main
from ltloss.float8 import decoded
from ltloss.optim import PrototypeSGD
from ltloss.testing import relative_error
from ltloss.tools.plan import KEPT_WIDTHS
from ltloss.training.run.prepare import prepare_data
from ltloss.training.run.run_config import RunConfig
from ltloss.training.run.settings import PROTOTYPE_DTYPES, STATE_DTYPES, Settings
from ltloss.training.run.trainer import Trainer, train

pytestmark = pytest.mark.slow

KINDS: dict[str, dict[str, str]] = {
    "stochastic": {"prototype_dtype": "bfloat16"},
    "kahan": {"prototype_dtype": "bfloat16", "rounding": "kahan", "state_dtype": "bfloat16"},
    "nearest": {"prototype_dtype": "bfloat16", "rounding": "nearest"},
    "state": {"state_dtype": "bfloat16"},
    "float8": {"prototype_dtype": "float8_e4m3fn", "state_dtype": "bfloat16"},
}


def _trainer(data: Path, **given: Any) -> tuple[Trainer, Any]:
    prepared = prepare_data(Settings(**toy_settings(data, loss="arcface", lr=0.2, fused_update=True, **given)))
    return Trainer(prepared.config, prepared.train, torch.device("cpu")), prepared.test


def _prototypes(trainer: Trainer) -> torch.Tensor:
    head: Any = trainer.classifier.loss
    weight, exponent = head.weight.detach(), head.weight_exponent
    return weight.to(torch.float32, copy=True) if exponent is None else decoded(weight, exponent)


@pytest.mark.parametrize(
    ("kind", "unit"), [("stochastic", 2**-8), ("kahan", 2**-8), ("state", 2**-8), ("float8", 2**-4)]
)
def test_the_prototypes_go_the_way_of_float32(kind: str, unit: float, toy_npz: Path) -> None:
    """From the same start, after an epoch of four steps: each write adds at most a unit of the last place."""
    (narrow, test), (wide, _) = _trainer(toy_npz, **KINDS[kind]), _trainer(toy_npz)
    wide.classifier.load_state_dict(narrow.classifier.state_dict())
    start = _prototypes(narrow)
    assert torch.equal(_prototypes(wide), start)
    for trainer in (narrow, wide):
        trainer.run_epoch(1, test)
    end = _prototypes(wide)
    assert relative_error(end, start) > 4 * unit, "the test would say little"
    assert relative_error(_prototypes(narrow), end) < 4 * unit
    assert not torch.equal(_prototypes(narrow), end)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_a_run_hold_what_it_kept(kind: str, toy_npz: Path, tmp_path: Path) -> None:
    given = KINDS[kind]
    train(tmp_path / "run", toy_settings(toy_npz, loss="long-tail", fused_update=True, **given), quiet=True)
    settings = RunConfig.read(tmp_path / "run").settings
    assert settings.rounding == given.get("rounding", "stochastic")
    folder = tmp_path / "run" / "checkpoints" / "epoch-0002"
    model, kept = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")
    assert model["loss.weight"].dtype == getattr(torch, given.get("prototype_dtype", "float32"))
    assert kept["loss.weight"].dtype == getattr(torch, given.get("state_dtype", "float32"))
    assert ("loss.weight_exponent" in model) == (kind == "float8")
    assert ("loss.weight.compensation" in kept) == (kind == "kahan")
    if kind == "kahan":
        unit = model["loss.weight"].float().abs() * 2**-7
        assert bool((kept["loss.weight.compensation"].float().abs() <= unit).all())
        assert bool(kept["loss.weight.compensation"].any())


def test_the_optimizer_has_the_settings(toy_npz: Path) -> None:
    heads = [_trainer(toy_npz, seed=seed, **KINDS["kahan"])[0].optimizers[-1] for seed in (0, 1)]
    for head in heads:
        assert isinstance(head, PrototypeSGD)
        assert head.rounding == "kahan"
        assert head.state[head.weight]["momentum_buffer"].dtype == torch.bfloat16
    first, second = (head.param_groups[0]["seed"] for head in heads)
    assert first != second  # the rounding of another run is another


@pytest.mark.parametrize("kind", ["stochastic", "kahan", "float8"])
def test_the_commands_use_such_a_run(
    kind: str, toy_npz: Path, toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, flags = tmp_path / "run", []
    for name, value in KINDS[kind].items():
        flags += [f"--{name.replace('_', '-')}", value]
    line = ["train", "--data", str(toy_npz), "--out", str(run), "--loss", "arcface", "--fused-update", *flags]
    line += ["--epochs", "8", "--batch-size", "16", "--embedding-size", "8", "--device", "cpu", "--quiet"]
    assert main(line) == 0
    assert "The closest prototypes" in (run / "report.html").read_text()
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    row = list(csv.DictReader((run / "metrics.csv").open()))[-1]
    found = json.loads(capsys.readouterr().out)
    assert (found["accuracy"], found["loss"]) == (float(row["test_accuracy"]), float(row["test_loss"]))
    assert main(["predict", str(run), "--images", str(toy_folder), "--out", str(tmp_path / "found")]) == 0
    rows = list(csv.DictReader((tmp_path / "found" / "predictions.csv").open()))
    right = [row["class"] == Path(row["image"]).parent.name for row in rows]
    assert len(rows) == 30
    assert sum(right) > 25


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        ("--prototype-dtype bfloat16", ("--prototype-dtype", "--fused-update")),
        ("--state-dtype bfloat16", ("--state-dtype", "--fused-update")),
        ("--rounding stochastic", ("--rounding", "--fused-update")),
        ("--fused-update --rounding kahan", ("--rounding kahan", "float32")),
        ("--fused-update --rounding kahan --state-dtype bfloat16", ("--rounding kahan", "stochastic", "nearest")),
        ("--fused-update --rounding kahan --prototype-dtype float8_e4m3fn", ("--rounding kahan", "stochastic")),
        ("--fused-update --state-dtype bfloat16 --momentum 0", ("--state-dtype", "--momentum")),
        ("--fused-update --prototype-dtype bfloat16 --loss softmax", ("--fused-update", "softmax")),
        ("--fused-update --prototype-dtype float16", ("--prototype-dtype", "float16", "bfloat16")),
        ("--fused-update --state-dtype float8_e4m3fn", ("--state-dtype", "float8_e4m3fn", "bfloat16")),
    ],
)
def test_what_does_not_go_together_is_refused(
    flags: str, facts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    fails([*TRAIN, *flags.split()], capsys, *facts)
    assert not Path("run").exists()


def test_a_run_keeps_its_dtypes(toy_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    train(out, toy_settings(toy_npz, fused_update=True, **KINDS["stochastic"]), quiet=True)
    line = ["train", "--resume", "--out", str(out), "--epochs", "3", "--quiet"]
    fails([*line, "--prototype-dtype", "float32"], capsys, "prototype_dtype", "bfloat16", "float32")
    fails([*line, "--rounding", "kahan"], capsys, "rounding", "stochastic", "kahan")
    assert main([*line, "--prototype-dtype", "bfloat16"]) == 0


def test_the_plan_calls_the_dtypes_alike() -> None:
    assert list(KEPT_WIDTHS["prototype_dtype"]) == list(PROTOTYPE_DTYPES)
    assert list(KEPT_WIDTHS["state_dtype"]) == list(STATE_DTYPES)
