"""``--loss-option sub_centers=K``: a run that is trained, resumed, measured, shown and predicted with as any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.toys import toy_settings

from ltloss.cli.command import main
from ltloss.training.data.sources import load_data
from ltloss.training.measure.evaluate import evaluate_run
from ltloss.training.model.classifier import Classifier
from ltloss.training.run.trainer import train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("loss", ["arcface", "long-tail"])
def test_a_run_with_sub_centers(loss: str, toy_npz: Path, toy_folder: Path, tmp_path: Path) -> None:
    given = {"loss": loss, "loss_options": {"sub_centers": 3}}
    train(tmp_path / "run", toy_settings(toy_npz, epochs=6, **given), quiet=True)
    result = train(tmp_path / "run", toy_settings(toy_npz, epochs=8, **given), resume=True, quiet=True)
    assert result.history[-1]["test_accuracy"] >= 0.9
    loaded = Classifier.load(tmp_path / "run", "cpu")
    assert loaded.loss.weight.shape[:2] == (3, 3)
    measured = evaluate_run(tmp_path / "run", str(toy_npz), device="cpu")
    assert measured.metrics.accuracy == pytest.approx(result.history[-1]["test_accuracy"])
    test = load_data(str(toy_npz), split="test")
    with torch.no_grad():
        features = loaded.features(test.batch(np.arange(len(test))))
    best = loaded.loss.predict(features)
    right = best.index[:, 0] == torch.from_numpy(test.labels)
    assert float(right.double().mean()) == pytest.approx(measured.metrics.accuracy)
    assert right.all(), "the next line takes the own angle to be the best one"
    own = best.cosine[:, 0].double().acos().mean()
    assert measured.metrics.own_angle_mean == pytest.approx(float(own), rel=1e-4)
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "Angles between prototypes" in (tmp_path / "run" / "report.html").read_text()
    out = tmp_path / "out"
    assert main(["predict", str(tmp_path / "run"), "--images", str(toy_folder), "--out", str(out)]) == 0
    assert len((out / "predictions.csv").read_text().splitlines()) == 31
