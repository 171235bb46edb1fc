from __future__ import annotations

import csv
import dataclasses
import inspect
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.refusals import refused
from helpers.toys import toy_images, toy_settings

import ltloss
from ltloss._files import temporary
from ltloss.errors import DivergedError, UserError
from ltloss.training.data.sources import load_data
from ltloss.training.measure.evaluate import evaluate_run
from ltloss.training.measure.metrics import COLUMNS
from ltloss.training.model.classifier import Classifier
from ltloss.training.model.registry import LOSSES
from ltloss.training.run.checkpoint import save_checkpoint
from ltloss.training.run.divergence import all_usable
from ltloss.training.run.optimizers import build_optimizers
from ltloss.training.run.prepare import prepare_data
from ltloss.training.run.run_config import RunConfig
from ltloss.training.run.schedules import learning_rate
from ltloss.training.run.settings import Settings
from ltloss.training.run.trainer import Trainer, TrainingResult, train

pytestmark = pytest.mark.slow


def losses_of(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without the time that they took."""
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def weights_of(run: Path, epoch: int) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = safetensors.torch.load_file(
        run / "checkpoints" / f"epoch-{epoch:04d}" / "model.safetensors"
    )
    return weights


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_and_is_loaded_again(loss: str, toy_npz: Path, tmp_path: Path) -> None:
    result = train(tmp_path / "run", toy_settings(toy_npz, loss=loss, epochs=8), quiet=True)
    first, last = result.history[0], result.history[-1]
    assert last["train_loss"] < first["train_loss"]
    assert last["test_accuracy"] >= 0.9
    loaded = Classifier.load(tmp_path / "run", "cpu")
    test = load_data(str(toy_npz), split="test")
    with torch.no_grad():
        predicted = loaded(test.batch(np.arange(len(test)))).argmax(1).numpy()
    assert (predicted == test.labels).mean() == pytest.approx(last["test_accuracy"])


def test_prototypes_and_buffers_are_trained_and_saved(toy_npz: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", toy_settings(toy_npz, loss="cosine-space", epochs=2), quiet=True)
    first, second = weights_of(tmp_path / "run", 1), weights_of(tmp_path / "run", 2)
    assert not torch.equal(first["loss.weight"], second["loss.weight"])
    assert (int(first["loss.step"]), int(second["loss.step"])) == (4, 8)
    assert second["loss.centers.counts"].tolist() == [40, 40, 40]


def test_one_seed_decides_everything(toy_npz: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        torch.rand(1)  # what the process drew before must not matter
        train(tmp_path / name, toy_settings(toy_npz, seed=seed, augment="crop-flip"), quiet=True)
    a, b, c = (losses_of(tmp_path / name) for name in "abc")
    assert a == b
    assert all(x["train_loss"] != y["train_loss"] for x, y in zip(a, c, strict=True))


def test_training_leaves_the_global_generator_alone(toy_npz: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train(tmp_path / "run", toy_settings(toy_npz, epochs=1), quiet=True)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        *((loss, {}) for loss in ("softmax", "long-tail", "cosine-space")),
        *((loss, {"fused_update": True}) for loss in ("long-tail", "cosine-space")),
        ("long-tail", {"fused_update": True, "prototype_dtype": "bfloat16"}),
        ("cosine-space", {"fused_update": True, "prototype_dtype": "bfloat16", "momentum": 0.0, "rounding": "kahan"}),
        ("arcface", {"fused_update": True, "prototype_dtype": "bfloat16", "state_dtype": "bfloat16"}),
        ("arcface", {"fused_update": True, "prototype_dtype": "float8_e4m3fn", "state_dtype": "bfloat16"}),
        ("long-tail", {"optimizer": "adamw", "ema": 0.9, "clip_norm": 0.5, "accumulate": 2}),
        ("arcface", {"optimizer": "adamw", "loss_options": {"sub_centers": 2}, "augment": "randaugment"}),
        ("arcface", {"optimizer": "adamw", "fused_update": True, "ema": 0.9, "drw_start": 0.5}),
        ("curricularface", {"ema": 0.5, "validation_fraction": 0.2}),
        ("arcface", {"optimizer": "adamw", "fused_update": True, "prototype_dtype": "bfloat16", "rounding": "kahan"}),
    ],
    ids=lambda given: given if isinstance(given, str) else "-".join(map(str, given.values())),
)
def test_resumed_run_is_the_uninterrupted_one(
    loss: str, options: dict[str, Any], toy_npz: Path, tmp_path: Path
) -> None:
    given = toy_settings(toy_npz, loss=loss, epochs=4, **options)
    train(tmp_path / "whole", given, quiet=True)
    # What a process leaves that died right after its second checkpoint, before metrics.csv.
    data = prepare_data(Settings(**given))
    trainer = Trainer(data.config, data.train, torch.device("cpu"), validation=data.validation)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in (tmp_path / "cut").iterdir():
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for epoch in (1, 2):
        trainer.run_epoch(epoch, data.test)
        save_checkpoint(tmp_path / "cut", epoch, trainer.checkpoint())
    temporary(tmp_path / "cut" / "checkpoints" / "epoch-0003").mkdir()
    train(tmp_path / "cut", {}, resume=True, quiet=True)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    last, other = (tmp_path / name / "checkpoints" / "epoch-0004" for name in ("whole", "cut"))
    files = {path.name: path.read_bytes() for path in last.glob("*.safetensors")}
    assert files == {path.name: path.read_bytes() for path in other.glob("*.safetensors")}
    assert files.keys() >= {"model.safetensors", "optimizer.safetensors"}
    assert not list((tmp_path / "cut").rglob(".*"))


def test_epochs_may_be_raised(toy_run: TrainingResult, tmp_path: Path) -> None:
    shutil.copytree(toy_run.run, tmp_path / "run")
    result = train(tmp_path / "run", {"epochs": 3}, resume=True, quiet=True)
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    assert losses_of(tmp_path / "run")[:2] == losses_of(toy_run.run)
    assert RunConfig.read(tmp_path / "run").settings.epochs == 3


def test_a_run_keeps_its_values_when_the_defaults_change(
    toy_run: TrainingResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(toy_run.run, tmp_path / "run")
    before = evaluate_run(toy_run.run).metrics
    monkeypatch.setattr("ltloss.losses.prototype_head.default_scale", lambda *_: 99.0)
    monkeypatch.setitem(inspect.unwrap(ltloss.LongTailLoss.__init__).__kwdefaults__, "margin", 0.25)
    changed = Classifier(RunConfig(Settings(), ("a", "b"), (3, 3), (1, 8, 8), (0.5,), (0.5,), {})).loss
    assert (changed.scale, changed.margin) == (99.0, 0.25)
    assert evaluate_run(toy_run.run).metrics == before
    train(tmp_path / "run", {"epochs": 3}, resume=True, quiet=True)
    settings = RunConfig.read(tmp_path / "run").settings
    assert (settings.scale, settings.margin) == (8.0, 0.5)
    kept = Classifier.load(tmp_path / "run").loss
    assert (kept.scale, kept.margin) == (8.0, 0.5)


def test_finished_run_is_left_as_it_is(toy_run: TrainingResult, tmp_path: Path) -> None:
    shutil.copytree(toy_run.run, tmp_path / "run")
    (tmp_path / "run" / "metrics.csv").unlink()
    train(tmp_path / "run", {}, resume=True, quiet=True)
    for name in ("metrics.csv", "config.json", "checkpoints/epoch-0002/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (toy_run.run / name).read_bytes()


def test_changed_data_cannot_be_resumed(toy_npz: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    shutil.copy(toy_npz, data)
    train(tmp_path / "run", toy_settings(data, epochs=1), quiet=True)
    arrays = dict(np.load(data))
    arrays["x_train"][0] ^= 255
    np.savez(data, **arrays)
    with refused(str(data), error=UserError):
        train(tmp_path / "run", {"epochs": 2}, resume=True, quiet=True)


def test_moved_data_can_be_resumed(toy_folder: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", toy_settings(toy_folder, epochs=1), quiet=True)
    shutil.copytree(tmp_path / "run", tmp_path / "stayed")
    train(tmp_path / "stayed", {"epochs": 2}, resume=True, quiet=True)
    moved = toy_folder.rename(tmp_path / "moved")
    train(tmp_path / "run", {"data": str(moved), "epochs": 2}, resume=True, quiet=True)
    assert RunConfig.read(tmp_path / "run").settings.data == str(moved)
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "stayed")


def test_a_run_inside_its_data_is_refused(toy_folder: Path) -> None:
    with refused("--out", str(toy_folder / "run"), "--data", str(toy_folder), error=UserError):
        train(toy_folder / "run", toy_settings(toy_folder), quiet=True)
    assert not (toy_folder / "run").exists()


def test_metrics_file_has_the_columns_and_empty_cells(toy_run: TrainingResult) -> None:
    rows = losses_of(toy_run.run)
    assert tuple(csv.DictReader((toy_run.run / "metrics.csv").open()).fieldnames or ()) == COLUMNS
    # 20 training images a class: all are medium.
    assert {(row["many"], row["few"]) for row in rows} == {("", "")}
    assert all(math.isfinite(float(row["medium"])) for row in rows)
    evaluation = json.loads((toy_run.run / "evaluation.json").read_text())
    assert evaluation["many"] is None
    assert evaluation["accuracy"] == float(rows[-1]["test_accuracy"])
    assert set(evaluation["per_class"]) == {"apple", "bean", "corn"}


def test_the_long_tail_and_the_limits_act_on_their_split(toy_npz: Path) -> None:
    settings = Settings(**toy_settings(toy_npz, limit_per_class=9, imbalance=9.0, limit_test=4))
    data = prepare_data(settings)
    assert data.config.class_counts == (9, 3, 1)
    assert len(data.train) == 13
    assert len(data.test) == 4


def test_normalisation_is_that_of_the_training_images(toy_npz: Path) -> None:
    data = prepare_data(Settings(**toy_settings(toy_npz)))
    pixels = toy_images(20)[0] / 255
    assert data.config.mean == pytest.approx((pixels.mean(),))
    assert data.config.std == pytest.approx((pixels.std(),))
    classifier = Classifier(data.config)
    seen: list[torch.Tensor] = []
    classifier.backbone = torch.nn.Sequential(torch.nn.Flatten())
    classifier.norm = torch.nn.Identity()
    classifier.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    classifier.features(data.train.batch(np.arange(60)))
    assert float(seen[0].mean()) == pytest.approx(0, abs=1e-6)
    assert float(seen[0].std(correction=0)) == pytest.approx(1, rel=1e-5)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    settings = Settings(data="digits", lr=0.5, warmup=0.1)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[9] == rates[10] == 0.5
    assert rates[55] == pytest.approx(0.25)
    assert 0 < rates[-1] < 0.001
    assert learning_rate(dataclasses.replace(settings, warmup=0.0), 0, 1) == 0.5


def test_prototypes_are_optimized_and_biases_do_not_decay() -> None:
    config = RunConfig(Settings(data="digits"), ("a", "b"), (3, 3), (1, 8, 8), (0.5,), (0.5,), {})
    classifier = Classifier(config)
    (optimizer,) = build_optimizers(classifier, config.settings)
    decay = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert decay.keys() == set(classifier.parameters())
    assert decay[classifier.loss.weight] == 5e-4
    assert all(decay[p] == 0 for name, p in classifier.named_parameters() if name.endswith("bias"))


def test_loss_that_is_not_finite_stops_with_its_step(
    toy_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = ltloss.LongTailLoss.forward, 0

    def failing(self: ltloss.LongTailLoss, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = original(self, features, labels)
        return loss * math.nan if calls == 7 else loss

    monkeypatch.setattr(ltloss.LongTailLoss, "forward", failing)
    with refused("nan", "3", "4", "2", "--lr", error=DivergedError):
        train(tmp_path / "run", toy_settings(toy_npz, epochs=3), quiet=True)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch-0001"]
    assert Classifier.load(tmp_path / "run").config.class_counts == (20, 20, 20)


def test_what_the_last_update_of_an_epoch_spoils_is_not_stored(toy_npz: Path, tmp_path: Path) -> None:
    given = toy_settings(toy_npz, loss="softmax", batch_size=100, lr=1e38, warmup=0, schedule="0.999:1", epochs=1)
    with refused("weights", "epoch 1", "--lr", error=DivergedError):
        train(tmp_path / "run", given, quiet=True)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_every_dtype_are_looked_at(dtype: torch.dtype) -> None:
    weights = [torch.full((2, 3), value).to(dtype) for value in (0.0, -448.0, math.nan)]
    assert [bool(all_usable(weight)) for weight in weights] == [True, True, False]
    assert all_usable(torch.empty(0, 3, dtype=dtype))
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        assert not all_usable(torch.tensor([0, -math.inf], dtype=dtype))


def test_bfloat16_training_works_without_a_gpu(toy_npz: Path, tmp_path: Path) -> None:
    given = toy_settings(toy_npz, limit_per_class=4, epochs=1)
    half = train(tmp_path / "half", {**given, "amp": True}, quiet=True).history[0]["train_loss"]
    full = train(tmp_path / "full", given, quiet=True).history[0]["train_loss"]
    assert half == pytest.approx(full, rel=0.05)
    assert half != full


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("loss", LOSSES)
def test_training_on_a_gpu(loss: str, toy_npz: Path, tmp_path: Path) -> None:
    result = train(tmp_path / "run", toy_settings(toy_npz, loss=loss, epochs=6, device="cuda"), quiet=True)
    assert result.history[-1]["test_accuracy"] >= 0.9
    assert Classifier.load(tmp_path / "run", "cpu").loss.weight.device.type == "cpu"
