"""`--fused-update`: the run is that of PyTorch's optimizer, and what it cannot serve is refused before it begins."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.refusals import refused
from helpers.toys import toy_settings
from safetensors.torch import load_file

import ltloss
from ltloss.errors import DivergedError, UserError
from ltloss.optim import PrototypeSGD
from ltloss.testing import relative_error
from ltloss.training.run.prepare import prepare_data
from ltloss.training.run.settings import Settings
from ltloss.training.run.trainer import Trainer, train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "given",
    [
        {"loss": "arcface", "schedule": "2:0.1"},
        {"loss": "long-tail", "drw_start": 1.0},  # whose minimum angle joins before the update
        {"loss": "cosine-space", "momentum": 0.0, "weight_decay": 0.01},
        {"loss": "long-tail-prior", "mixup": 0.4},  # two labels in one pass
        # A bias in front of batch normalisation has no gradient but rounding, which AdamW would make large.
        {"loss": "cosface", "optimizer": "adamw", "embedding_norm": False},
    ],
    ids=lambda given: given["loss"],
)
def test_a_fused_run_is_the_ordinary_one(given: dict[str, Any], toy_npz: Path, tmp_path: Path) -> None:
    curves, tensors = [], []
    for fused in (False, True):
        out = tmp_path / str(fused)
        result = train(out, toy_settings(toy_npz, epochs=3, fused_update=fused, **given), quiet=True)
        curves.append([row["train_loss"] for row in result.history])
        files = ("model.safetensors", "optimizer.safetensors")
        tensors.append(
            {(file, k): t for file in files for k, t in load_file(out / "checkpoints/epoch-0003" / file).items()}
        )
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert relative_error(tensors[1][name], tensor) < 1e-3, name


def test_no_gradient_of_the_prototypes_is_made(toy_npz: Path) -> None:
    data = prepare_data(Settings(**toy_settings(toy_npz, loss="arcface", fused_update=True)))
    trainer = Trainer(data.config, data.train, torch.device("cpu"))
    weight, before = trainer.classifier.loss.weight, trainer.classifier.loss.weight.detach().clone()
    rest, head = trainer.optimizers
    assert isinstance(head, PrototypeSGD)
    assert not any(parameter is weight for group in rest.param_groups for parameter in group["params"])
    trainer.run_epoch(1, data.test)
    assert weight.grad is None
    assert not torch.equal(weight, before)
    assert all(p.grad is not None for p in trainer.classifier.backbone.parameters())


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        ({"loss": "softmax"}, ("--loss", "softmax")),
        ({"mixup": 0.2, "loss": "adaface"}, ("--mixup", "--loss adaface")),
        ({"mixup": 0.2, "loss": "cosine-space"}, ("--mixup", "--loss cosine-space")),
        ({"loss": "arcface", "loss_options": {"sub_centers": 3}}, ("--loss-option", "sub_centers=3")),
    ],
)
def test_what_it_cannot_serve_is_refused_before_training(
    given: dict[str, Any], facts: tuple[str, ...], toy_npz: Path, tmp_path: Path
) -> None:
    with refused("--fused-update", *facts, error=UserError):
        train(tmp_path / "run", toy_settings(toy_npz, fused_update=True, **given), quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_dense_reference_is_refused_before_training(toy_npz: Path, tmp_path: Path) -> None:
    with ltloss.use_backend("reference"), refused("--fused-update", "LTLOSS_BACKEND", error=UserError):
        train(tmp_path / "run", toy_settings(toy_npz, fused_update=True), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_says_so_once(toy_npz: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with refused("nan", "--lr", error=DivergedError):
            train(tmp_path / "run", toy_settings(toy_npz, fused_update=True, lr=1e30), quiet=True)


def test_a_step_that_was_skipped_ends_the_run(toy_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step of an epoch, whose NaN no later loss would show."""
    original, calls = ltloss.ArcFaceLoss.forward, 0

    def failing(self: ltloss.ArcFaceLoss, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        loss = original(self, features, labels)
        calls += torch.is_grad_enabled()
        if calls == 4 and loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(ltloss.ArcFaceLoss, "forward", failing)
    with refused("prototypes", "1 of 4 steps", "epoch 1", "--lr", error=DivergedError):
        train(tmp_path / "run", toy_settings(toy_npz, fused_update=True, loss="arcface"), quiet=True)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
