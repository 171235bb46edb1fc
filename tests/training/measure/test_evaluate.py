from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.refusals import missing
from helpers.toys import toy_settings

from ltloss.training.measure.evaluate import evaluate_run
from ltloss.training.run.trainer import train


def test_own_data_is_measured_as_the_run_used_it(
    toy_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    settings = toy_settings(toy_npz, imbalance=4.0, limit_per_class=12, limit_test=7)
    trained = train(run, settings, quiet=True).evaluation
    assert trained.metrics.images == 7
    monkeypatch.chdir(toy_npz.parent)
    for data in (None, str(toy_npz), toy_npz.name):
        assert evaluate_run(run, data).metrics == trained.metrics
        on_training = evaluate_run(run, data, split="train").metrics
        assert on_training.images == sum(trained.config.class_counts) == 12 + 6 + 3
        assert evaluate_run(run, data, split="all").metrics.images == 75
    shutil.copy(toy_npz, tmp_path / "other.npz")
    assert evaluate_run(run, str(tmp_path / "other.npz")).metrics.images == 15


def test_other_data_without_splits_is_measured_whole(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(toy_folder, other)
    run = tmp_path / "run"
    train(run, toy_settings(toy_folder), quiet=True)
    assert evaluate_run(run).metrics.images == 6
    assert capsys.readouterr().err == ""
    found = evaluate_run(run, str(other))
    assert (found.metrics.images, found.split) == (30, "all")
    assert f"on all images of {other}" in found.to_text()
    (told,) = capsys.readouterr().err.splitlines()
    assert not missing(told, str(other))
    shutil.rmtree(other)
    shutil.copytree(toy_folder, other / "train")
    shutil.copytree(toy_folder, other / "test")
    assert evaluate_run(run, str(other)).split == "test"
    assert capsys.readouterr().err == ""
