"""A run folder as training leaves it, made in a moment: untrained weights, and a history that is made up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ltloss.training.model.classifier import Classifier
from ltloss.training.run.checkpoint import Checkpoint, save_checkpoint
from ltloss.training.run.run_config import RunConfig
from ltloss.training.run.run_folder import write_config, write_metrics
from ltloss.training.run.settings import Settings

HOSTILE = ("<script>alert(1)</script>", "a \"quoted\" & <b>bold</b> 'name'", "../x", "a/b", "CON", "", "né, 猫\nzwei")


def history(epochs: int, **last: Any) -> list[dict[str, Any]]:
    """Rows for metrics.csv, of which the last has the values given."""
    rows = [
        {
            "epoch": epoch,
            "lr": 0.1,
            "train_loss": 3 / epoch,
            "train_accuracy": 1 - 0.9 / epoch,
            "test_loss": 2 / epoch,
            "test_accuracy": 0.5 + 0.01 * epoch,
            "many": 0.75,
            "medium": None,
            "few": 0.125,
            "feature_norm_mean": 4.0,
            "own_angle_mean": 1.0,
            "seconds": 1.5,
        }
        for epoch in range(1, epochs + 1)
    ]
    rows[-1].update(last)
    return rows


def make_run(
    folder: Path,
    class_names: Sequence[str],
    *,
    counts: Sequence[int] | None = None,
    shape: tuple[int, int, int] = (3, 16, 16),
    rows: Sequence[dict[str, Any]] | None = None,
    **settings: Any,
) -> Classifier:
    """Write RUN/config.json, metrics.csv and a checkpoint, and return the classifier that is in it."""
    chosen = {"data": "digits", "loss": "cosine", "embedding_size": 16, "epochs": 3, "device": "cpu", **settings}
    config = RunConfig(
        settings=Settings(**chosen),
        class_names=tuple(class_names),
        class_counts=tuple(counts or [10 * (c + 1) for c in range(len(class_names))]),
        image_shape=shape,
        mean=(0.5,) * shape[0],
        std=(0.25,) * shape[0],
        versions={"ltloss": "0", "torch": "0", "python": "0"},
    )
    folder.mkdir(parents=True)
    write_config(folder, config)
    rows = history(3) if rows is None else rows
    if rows:
        write_metrics(folder, rows)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        classifier = Classifier(config).eval()
    save_checkpoint(folder, max(1, len(rows)), Checkpoint(classifier.state_dict(), {}, {"history": list(rows)}))
    return classifier
