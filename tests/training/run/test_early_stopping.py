"""A validation part, early stopping on it, and the weights of the best epoch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from helpers.toys import toy_settings
from safetensors.torch import load_file

from ltloss.errors import UserError
from ltloss.training.measure.evaluate import evaluate_run
from ltloss.training.model.classifier import Classifier
from ltloss.training.model.weights import read_weights
from ltloss.training.pages.run_report import write_report
from ltloss.training.run.checkpoint import checkpoint_in_use
from ltloss.training.run.early_stopping import best_epoch, is_over
from ltloss.training.run.prepare import prepare_data
from ltloss.training.run.settings import Settings
from ltloss.training.run.trainer import Trainer, TrainingResult, train
from tests.training.run.test_trainer import losses_of

FOUND = (0.5, 0.8, 0.75, 0.8, 0.9)  # balanced accuracy of the validation part, epoch by epoch


def _history(*found: float) -> list[dict[str, float]]:
    return [{"validation_balanced_accuracy": value} for value in found]


def test_the_first_of_the_best_epochs_counts() -> None:
    assert [best_epoch(_history(*FOUND[:n])) for n in range(6)] == [0, 1, 2, 2, 2, 5]
    assert [is_over(_history(*FOUND[:n]), 2) for n in range(6)] == [False] * 4 + [True, False]
    assert not is_over(_history(*FOUND[:4]), 3)
    assert not is_over(_history(*FOUND[:4]), None)


def test_the_validation_part_is_held_out_of_training_alone(toy_npz: Path) -> None:
    given = toy_settings(toy_npz, limit_per_class=10, imbalance=10.0, validation_fraction=0.25)
    whole, parts = prepare_data(Settings(**{**given, "validation_fraction": 0.0})), prepare_data(Settings(**given))
    assert whole.config.class_counts == (10, 3, 1)
    assert whole.validation is None
    assert parts.config.class_counts == (8, 2, 1)
    assert parts.validation is not None
    assert np.bincount(parts.validation.labels).tolist() == [2, 1]
    seen = {*parts.train.names, *parts.validation.names}
    assert seen == set(whole.train.names)
    assert len(seen) == len(parts.train) + len(parts.validation)
    assert parts.test.names == whole.test.names


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation finds what ``FOUND`` says."""
    monkeypatch.setattr(Trainer, "_validated", lambda self: FOUND[len(self.history)])


def _given(data: Path, **more: Any) -> dict[str, Any]:
    return toy_settings(data, epochs=9, loss="arcface", validation_fraction=0.2, early_stopping=2, **more)


def _model(run: Path, epoch: int) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(run / "checkpoints" / f"epoch-{epoch:04d}" / "model.safetensors")
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_stops_and_its_best_epoch_is_used(ema: float, decided: None, toy_npz: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(run, _given(toy_npz, ema=ema), quiet=True)
    assert len(result.history) == 4
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["epoch-0002", "epoch-0003", "epoch-0004"]
    assert torch.equal(Classifier.load(run).loss.weight, _model(run, 2)["loss.weight"])
    assert not torch.equal(_model(run, 2)["loss.weight"], _model(run, 4)["loss.weight"])
    assert "test accuracy, best validation epoch (2)" in write_report(run).read_text(encoding="utf-8")
    best = result.history[1]
    assert result.evaluation.metrics.loss == best["test_loss"] == evaluate_run(run).metrics.loss
    assert json.loads((run / "evaluation.json").read_text())["loss"] == best["test_loss"]
    shutil.rmtree(run / "checkpoints" / "epoch-0004")  # as after damage: the one before names the same epoch
    assert checkpoint_in_use(run) == run / "checkpoints" / "epoch-0002"
    again = train(run, {}, resume=True, quiet=True)
    assert again.evaluation.metrics == result.evaluation.metrics


def test_another_training_begins_with_its_best_epoch(decided: None, toy_npz: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", _given(toy_npz), quiet=True).run
    used, taken = Classifier.load(run, "cpu").state_dict(), read_weights(run)
    assert all(torch.equal(taken[name], tensor) for name, tensor in used.items())


@pytest.mark.slow
@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_killed_and_resumed_it_stops_alike(killed_after: int, decided: None, toy_npz: Path, tmp_path: Path) -> None:
    original = Trainer.run_epoch

    def killed(self: Trainer, epoch: int, *given: Any) -> dict[str, Any]:
        if epoch > killed_after:
            raise KeyboardInterrupt
        return original(self, epoch, *given)

    whole = train(tmp_path / "whole", _given(toy_npz), quiet=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "run_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", _given(toy_npz), quiet=True)
    cut: TrainingResult = train(tmp_path / "cut", {}, resume=True, quiet=True)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    assert cut.evaluation.metrics == whole.evaluation.metrics
    for epoch in (2, 3, 4):
        for file in ("model.safetensors", "optimizer.safetensors"):
            one, other = (tmp_path / name / "checkpoints" / f"epoch-{epoch:04d}" / file for name in ("whole", "cut"))
            assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_the_test_split_decides_nothing(toy_npz: Path, tmp_path: Path) -> None:
    """With other test images the same epochs are trained, and the same one is kept."""
    arrays = dict(np.load(toy_npz))
    arrays["x_test"] = 255 - arrays["x_test"]
    np.savez(tmp_path / "other.npz", **arrays)
    runs = [
        train(tmp_path / path.stem, _given(path, batch_size=30, lr=0.01), quiet=True)
        for path in (toy_npz, tmp_path / "other.npz")
    ]
    assert [len(result.history) for result in runs] == [len(runs[0].history)] * 2
    one, other = (Classifier.load(result.run).state_dict() for result in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert runs[0].evaluation.metrics.loss != runs[1].evaluation.metrics.loss


def test_what_cannot_be_is_refused(toy_npz: Path) -> None:
    with refused("--early-stopping", "--validation-fraction", error=UserError):
        Settings(data="digits", early_stopping=3)
    with refused("early_stopping", "0", error=UserError):
        Settings(data="digits", early_stopping=0, validation_fraction=0.1)
    with refused("validation_fraction", "1.0", error=UserError):
        Settings(data="digits", validation_fraction=1.0)
    single = toy_settings(toy_npz, limit_per_class=1, validation_fraction=0.2)
    with refused("--validation-fraction", error=UserError):
        prepare_data(Settings(**single))
