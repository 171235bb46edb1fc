"""`ltloss train --parallel class` on two ranks: files of one run, resumable, usable by one process."""

from __future__ import annotations

import csv
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import world
from helpers.refusals import refused

pytest.importorskip("safetensors")
pytest.importorskip("PIL")
from helpers.toys import toy_settings, write_embeddings, write_images

from ltloss.errors import UserError
from ltloss.training.data.mixup import mix
from ltloss.training.measure.evaluate import evaluate_run
from ltloss.training.model.classifier import Classifier
from ltloss.training.run.trainer import train

pytestmark = pytest.mark.slow


def _settings(data: Path, epochs: int, loss: str = "cosine-space") -> dict[str, Any]:
    return {**toy_settings(data, epochs=epochs, loss=loss, backbone="small-cnn"), "parallel": "class"}


def _train(rank: int, data: Path, out: Path) -> tuple[float, float]:
    result = train(out / "whole", _settings(data, 3), quiet=True)
    if rank == 0:  # as a job leaves it that was killed in its third epoch
        shutil.copytree(out / "whole", out / "resumed")
        shutil.rmtree(out / "resumed" / "checkpoints" / "epoch-0003")
    dist.barrier()
    if rank == 1:  # later than the other, which must not own the folder before this one has looked at it
        time.sleep(1.0)
    train(out / "resumed", _settings(data, 3), resume=True, quiet=True)
    train(out / "long-tail", _settings(data, 1, "long-tail"), quiet=True)
    several = {"loss_options": {"sub_centers": 2}}
    train(out / "sub-centres", {**_settings(data, 1, "arcface"), **several}, quiet=True)
    for head in ("linear", "mlp"):
        given = toy_settings(out / "embeddings.npz", loss="logit-adjusted", head=head, embedding_size=64, epochs=8)
        found = train(out / head, {**given, "parallel": "class"}, quiet=True)
        assert (found.evaluation.metrics.accuracy or 0) > 0.9
    with refused("--parallel", "sub_centers", "min_angle_weight=0", error=UserError):
        train(out / "no search", {**_settings(data, 1, "long-tail"), **several}, quiet=True)
    with refused("softmax", error=UserError):
        train(out / "softmax", _settings(data, 1, "softmax"), quiet=True)
    with refused("--fused-update", "min_angle_weight", error=UserError):
        train(out / "angles", {**_settings(data, 1, "long-tail"), "fused_update": True}, quiet=True)
    with refused("--fused-update", "--mixup", "--parallel class", error=UserError):
        train(out / "mixed", {**_settings(data, 1, "arcface"), "fused_update": True, "mixup": 0.4}, quiet=True)
    return result.history[-1]["train_loss"], result.history[-1]["train_accuracy"]


def _rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def test_train_on_two_ranks(tmp_path: Path) -> None:
    data = write_images(tmp_path / "toy.npz")
    write_embeddings(tmp_path / "embeddings.npz")
    first, second = world.run(_train, 2, data, tmp_path)
    assert first == second
    assert _rows(tmp_path / "whole") == _rows(tmp_path / "resumed")
    losses = [float(row["train_loss"]) for row in _rows(tmp_path / "whole")]
    assert losses[-1] < losses[0]
    assert not (tmp_path / "softmax").exists()
    assert not (tmp_path / "angles").exists()
    classifier = Classifier.load(tmp_path / "whole")
    assert type(classifier.loss.weight) is torch.nn.Parameter
    evaluation = evaluate_run(tmp_path / "whole", None, split="test", device="cpu")
    assert f"{evaluation.metrics.accuracy:.6f}" == f"{float(_rows(tmp_path / 'whole')[-1]['test_accuracy']):.6f}"


def _apart(rank: int, data: Path, out: Path) -> None:
    """As on nodes without a common file system: each rank has a folder of its own, and the first one writes."""
    given = _settings(data, 2)
    train(out / str(rank), given, quiet=True)
    if rank == 0:
        shutil.rmtree(out / "0" / "checkpoints" / "epoch-0002")
    dist.barrier()
    with refused("--out", "rank 0", "epoch-0001", "rank 1", "no checkpoint", error=UserError):
        train(out / str(rank), given, resume=True, quiet=True)
    assert not (out / "1").exists()


def test_ranks_that_find_different_checkpoints_are_refused(tmp_path: Path) -> None:
    world.run(_apart, 2, write_images(tmp_path / "toy.npz"), tmp_path)


def _fused(rank: int, data: Path, out: Path) -> dict[bool, list[float]]:
    curves = {}
    for fused in (False, True):
        given = {**_settings(data, 3), "fused_update": fused}
        history = train(out / f"fused {fused}", given, quiet=True).history
        curves[fused] = [row["train_loss"] for row in history]
    if rank == 0:
        shutil.copytree(out / "fused True", out / "resumed")
        shutil.rmtree(out / "resumed" / "checkpoints" / "epoch-0003")
    dist.barrier()
    train(out / "resumed", {}, resume=True, quiet=True)
    return curves


def test_fused_update_on_two_ranks(tmp_path: Path) -> None:
    first, second = world.run(_fused, 2, write_images(tmp_path / "toy.npz"), tmp_path)
    assert first == second
    assert first[True] == pytest.approx(first[False], rel=1e-4)
    assert _rows(tmp_path / "resumed") == _rows(tmp_path / "fused True")
    whole, resumed = (
        (tmp_path / name / "checkpoints" / "epoch-0003" / "optimizer.safetensors").read_bytes()
        for name in ("fused True", "resumed")
    )
    assert whole == resumed


NARROW = {
    "bfloat16": {"prototype_dtype": "bfloat16", "state_dtype": "bfloat16"},
    "kahan": {"prototype_dtype": "bfloat16", "rounding": "kahan"},
    "float8": {"prototype_dtype": "float8_e4m3fn"},
}


def _narrow(rank: int, data: Path, out: Path) -> dict[str, list[float]]:
    curves = {}
    for name, kept in NARROW.items():
        given = {**_settings(data, 3), "fused_update": True, **kept}
        history = train(out / name, given, quiet=True).history
        curves[name] = [row["train_loss"] for row in history]
        if rank == 0:
            shutil.copytree(out / name, out / f"{name} resumed")
            shutil.rmtree(out / f"{name} resumed" / "checkpoints" / "epoch-0003")
        dist.barrier()
        train(out / f"{name} resumed", {}, resume=True, quiet=True)
    return curves


def test_narrow_prototypes_on_two_ranks(tmp_path: Path) -> None:
    data = write_images(tmp_path / "toy.npz")
    first, second = world.run(_narrow, 2, data, tmp_path)
    assert first == second
    for name, kept in NARROW.items():
        assert first[name][-1] < first[name][0]
        assert _rows(tmp_path / f"{name} resumed") == _rows(tmp_path / name)
        for file in ("model.safetensors", "optimizer.safetensors"):
            whole, resumed = (
                (tmp_path / run / "checkpoints" / "epoch-0003" / file).read_bytes() for run in (name, f"{name} resumed")
            )
            assert whole == resumed, (name, file)
        classifier = Classifier.load(tmp_path / name)
        assert classifier.loss.weight.dtype == getattr(torch, kept["prototype_dtype"])
        accuracy = evaluate_run(tmp_path / name, None, split="test", device="cpu").metrics.accuracy
        assert f"{accuracy:.6f}" == f"{float(_rows(tmp_path / name)[-1]['test_accuracy']):.6f}"


def test_one_process_needs_no_launcher(tmp_path: Path) -> None:
    data = write_images(tmp_path / "toy.npz")
    alone = train(tmp_path / "alone", _settings(data, 1), quiet=True).history
    plain = train(tmp_path / "plain", {**_settings(data, 1), "parallel": "none"}, quiet=True).history
    assert alone[0]["train_loss"] == plain[0]["train_loss"]


def test_several_processes_without_parallel_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("--parallel", "none", error=UserError):
        train(tmp_path / "run", {**_settings(write_images(tmp_path / "toy.npz"), 1), "parallel": "none"}, quiet=True)


OPTIONS = {"optimizer": "adamw", "clip_norm": 0.5, "accumulate": 2, "ema": 0.9, "batch_size": 8}
OPTIONS |= {"validation_fraction": 0.2, "early_stopping": 3}


def _options(rank: int, data: Path, out: Path) -> list[dict[str, Any]]:
    given = {**_settings(data, 3, "arcface"), **OPTIONS}
    history = train(out / "whole", given, quiet=True).history
    if rank == 0:
        shutil.copytree(out / "whole", out / "resumed")
        shutil.rmtree(out / "resumed" / "checkpoints" / "epoch-0003")
    dist.barrier()
    train(out / "resumed", {}, resume=True, quiet=True)
    fused = {"fused_update": True, "optimizer": "adamw", "embedding_norm": False}
    curves = []
    for given in (fused, {**fused, "fused_update": False}):
        found = train(out / str(len(curves)), {**_settings(data, 2, "arcface"), **given}, quiet=True).history
        curves.append([row["train_loss"] for row in found])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    names = ("train_loss", "train_accuracy", "validation_balanced_accuracy")
    return [{name: row[name] for name in names} for row in history]


def test_training_options_on_two_ranks(tmp_path: Path) -> None:
    first, second = world.run(_options, 2, write_images(tmp_path / "toy.npz"), tmp_path)
    assert first == second
    assert first[-1]["train_loss"] < first[0]["train_loss"]
    assert _rows(tmp_path / "whole") == _rows(tmp_path / "resumed")
    for file in ("model.safetensors", "optimizer.safetensors", "trained.safetensors"):
        whole, resumed = (tmp_path / name / "checkpoints" / "epoch-0003" / file for name in ("whole", "resumed"))
        assert whole.read_bytes() == resumed.read_bytes(), file


def _mixed(rank: int, data: Path, out: Path) -> list[float]:
    fractions = []

    def noted(*given: Any) -> Any:
        mixed = mix(*given)
        fractions.append(mixed[2])
        return mixed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ltloss.training.run.trainer.mix", noted)
        train(out / "mixed", {**_settings(data, 1, "arcface"), "mixup": 0.4}, quiet=True)
    return fractions


def test_two_ranks_mix_a_batch_by_one_fraction_whatever_their_parts(tmp_path: Path) -> None:
    first, second = world.run(_mixed, 2, write_images(tmp_path / "toy.npz", train=19), tmp_path)
    assert first == second
    assert len(set(first)) == 4  # of 57 images, the first batch has 8 and 7


def _linear(name: str, image_shape: tuple[int, int, int], embedding_size: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, embedding_size))


def _accumulated(rank: int, data: Path, out: Path) -> list[list[float]]:
    """Losses of two batches a step and of one large one; no batch normalisation, which would see a difference."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ltloss.training.model.classifier.build_backbone", _linear)
        given = {**_settings(data, 3, "long-tail"), "embedding_norm": False, "clip_norm": 0.5}
        curves = []
        for size in ({"batch_size": 9, "accumulate": 2}, {"batch_size": 18}):
            found = train(out / str(len(curves)), {**given, **size}, quiet=True).history
            curves.append([row["train_loss"] for row in found])
        return curves


def test_accumulated_batches_on_two_ranks_are_one_large_batch(tmp_path: Path) -> None:
    first, second = world.run(_accumulated, 2, write_images(tmp_path / "toy.npz"), tmp_path)
    assert first == second
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert first[0][-1] < first[0][0]
