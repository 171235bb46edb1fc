"""A run that is killed at any moment and continued is the run that was never killed."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.killed import exit_code, needs_sigkill, started
from helpers.profiles import nightly
from helpers.toys import toy_settings

from ltloss.cli.command import main
from ltloss.training.run.trainer import train
from tests.training.run.test_trainer import losses_of, weights_of

pytestmark = pytest.mark.slow

KILLS = 50 if nightly() else 4
EPOCHS = 8 + 4 * KILLS  # so many that no kill comes after the end


OPTIONS: list[dict[str, Any]] = [
    {},
    {"fused_update": True},
    {"optimizer": "adamw", "ema": 0.9, "clip_norm": 1.0, "accumulate": 2, "validation_fraction": 0.2},
]


@needs_sigkill
@pytest.mark.parametrize("options", OPTIONS, ids=lambda given: "-".join(given) or "default")
def test_killed_at_random_moments_it_continues_bit_for_bit(
    options: dict[str, Any], toy_npz: Path, tmp_path: Path
) -> None:
    given = toy_settings(toy_npz, epochs=EPOCHS, loss="cosine-space", **options)
    train(tmp_path / "whole", given, quiet=True)
    arguments = ["train", "--quiet", "--resume", "--out", str(tmp_path / "killed"), "--data", str(toy_npz)]
    arguments += f"--epochs {EPOCHS} --batch-size 16 --embedding-size 8 --device cpu --loss cosine-space".split()
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]

    moments, checkpoints = random.Random(0), tmp_path / "killed" / "checkpoints"

    def kept() -> int:
        return max((int(path.name[6:10]) for path in checkpoints.glob("epoch-????")), default=0)

    until_next = 0.06  # seconds from the start of a process to its first checkpoint
    for kill in range(KILLS):
        before, process, start = kept(), started(main, arguments), time.perf_counter()
        if kill % 2:  # in an epoch, or while one is written
            while process.is_alive() and kept() == before:
                time.sleep(0.002)
            until_next = time.perf_counter() - start
            time.sleep(moments.uniform(0, 0.06))
        else:  # while it starts, or reads what the one before has left
            time.sleep(moments.uniform(0, until_next))
        process.kill()
        process.join()
        assert process.exitcode == -9, "the run ended before it could be killed; raise EPOCHS"
        assert kept() >= before + kill % 2
    assert kept() < EPOCHS

    assert exit_code(main, arguments) == 0
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")
    whole, killed = (weights_of(tmp_path / name, EPOCHS) for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"epoch-{n:04d}" for n in (EPOCHS - 1, EPOCHS)]


CLASSES = 1100  # by as many samples: two slabs a backward


@pytest.fixture(scope="module")
def many_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images to train on of each class, one to test: two steps an epoch."""
    images = np.random.default_rng(0).integers(0, 256, (3 * CLASSES, 8, 8), dtype=np.uint8)
    labels = np.tile(np.arange(CLASSES), 3)
    path, split = tmp_path_factory.mktemp("many") / "many.npz", 2 * CLASSES
    np.savez(path, x_train=images[:split], y_train=labels[:split], x_test=images[split:], y_test=labels[split:])
    return path


@needs_sigkill
@pytest.mark.parametrize(
    "flags", ["", "--prototype-dtype bfloat16 --rounding kahan --state-dtype bfloat16"], ids=["float32", "kahan"]
)
def test_killed_between_two_slabs_it_continues_bit_for_bit(flags: str, many_classes: Path, tmp_path: Path) -> None:
    line = ["train", "--quiet", "--resume", "--data", str(many_classes), "--loss", "arcface", "--fused-update"]
    line += f"--epochs 4 --batch-size {CLASSES} --embedding-size 8 --device cpu --evaluate-every 4 {flags}".split()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert exit_code(main, [*line, "--out", str(whole)]) == 0
    for backward, epochs in ((4, 1), (3, 2)):  # of each process, and how many epochs are kept then
        assert exit_code(main, [*line, "--out", str(killed)], killed_in=backward) == -9
        assert len(losses_of(killed)) == epochs
    assert exit_code(main, [*line, "--out", str(killed)]) == 0
    assert losses_of(killed) == losses_of(whole)
    for file in ("model.safetensors", "optimizer.safetensors"):
        bits = [(run / "checkpoints" / "epoch-0004" / file).read_bytes() for run in (whole, killed)]
        assert bits[0] == bits[1], file
