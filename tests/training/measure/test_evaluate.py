from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.refusals import missing
from helpers.small_run import make_run
from helpers.toys import toy_settings
from sklearn.metrics import top_k_accuracy_score

from ltloss.training.measure.evaluate import evaluate_run
from ltloss.training.model.classifier import Classifier
from ltloss.training.run.checkpoint import Checkpoint, save_checkpoint
from ltloss.training.run.prepare import load_split
from ltloss.training.run.trainer import train

DIGITS = tuple("0123456789")


def test_own_data_is_measured_as_the_run_used_it(
    toy_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    settings = toy_settings(toy_npz, imbalance=4.0, limit_per_class=12, limit_test=7)
    trained = train(run, settings, quiet=True).evaluation
    assert trained.metrics.images == 7
    monkeypatch.chdir(toy_npz.parent)
    for data in (None, str(toy_npz), toy_npz.name):
        assert (found := evaluate_run(run, data)).metrics == trained.metrics
        assert found.details == trained.details
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


@pytest.mark.parametrize(
    "options",
    [{"loss": "softmax"}, {"loss": "arcface", "loss_options": {"sub_centers": 3}}],
    ids=["softmax", "centers"],
)
def test_every_number_is_that_of_the_logits(options: dict[str, object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    classifier = make_run(run, DIGITS, shape=(1, 8, 8), **options)
    test = load_split(classifier.config.settings, "test")
    with torch.inference_mode():
        logits = classifier(test.batch(np.arange(len(test)))).double()
    labels, probability = test.labels, logits.softmax(1)
    sure, predicted = (column.numpy() for column in probability.max(1))
    found = evaluate_run(run)
    top5 = top_k_accuracy_score(labels, logits, k=5, labels=range(10))
    assert found.metrics.top5_accuracy == pytest.approx(top5)
    assert 0.2 < top5 < 0.9  # so that it could be wrong
    assert found.details is not None
    worst = max((i for i in range(len(test)) if labels[i] != predicted[i]), key=lambda i: float(sure[i]))
    first = found.details.mistakes[0]
    assert (first.index, first.label, first.predicted) == (worst, labels[worst], predicted[worst])
    assert (first.image, first.probability) == (test.names[worst], pytest.approx(sure[worst], rel=1e-4))
    assert np.trace(found.details.matrix.counts) == (labels == predicted).sum()


def test_text_and_json_name_classes_and_images(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, DIGITS, shape=(1, 8, 8))
    found = evaluate_run(run)
    assert found.details is not None
    stored = json.loads(found.to_json())
    confusion, error = stored["confusions"][0], stored["confident_errors"][0]
    assert confusion["count"] == max(
        np.ravel(found.details.matrix.counts - np.diag(np.diag(found.details.matrix.counts)))
    )
    lines = found.to_text().splitlines()
    words = ["top-5 accuracy, %", "balanced accuracy, %", "macro-F1, %", "precision, %", "largest confusions"]
    assert not missing("\n".join(lines), *words, error["image"])
    (angle,) = [text.split()[-1] for text in lines if "mean angle" in text]
    assert angle == f"{np.degrees(stored['own_angle_mean']):.1f}°"
    (line,) = [at + 1 for at, text in enumerate(lines) if "largest confusions" in text]
    assert lines[line].split() == [
        *(confusion["true"], confusion["predicted"], str(confusion["count"]), f"{100 * confusion['fraction']:.1f}")
    ]


def test_a_class_takes_one_line_whatever_its_name_holds(tmp_path: Path) -> None:
    make_run(tmp_path / "run", DIGITS, shape=(1, 8, 8))
    found = evaluate_run(tmp_path / "run")
    names = tuple(f"{name}\n\x1b[31m" for name in found.config.class_names)
    strange = replace(found, config=replace(found.config, class_names=names)).to_text()
    assert len(strange.splitlines()) == len(found.to_text().splitlines())
    assert "\x1b" not in strange


def test_few_classes_have_no_line_about_the_top_5(toy_npz: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", toy_settings(toy_npz), quiet=True)
    found = evaluate_run(tmp_path / "run")
    assert found.metrics.top5_accuracy == 1.0
    assert "top-5" not in found.to_text()


def test_a_diverged_model_is_measured_and_its_json_is_json(tmp_path: Path) -> None:
    run = tmp_path / "run"
    classifier: Classifier = make_run(run, DIGITS, shape=(1, 8, 8))
    classifier.loss.weight.data.fill_(math.nan)
    save_checkpoint(run, 4, Checkpoint(classifier.state_dict(), {}, {"history": []}))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = evaluate_run(run)
    stored = json.loads(found.to_json(), parse_constant=refuse)
    assert (stored["loss"], stored["calibration_error"], stored["confident_errors"]) == (None, None, [])
    assert sum(map(sum, stored["confusion_matrix"]["counts"])) == stored["pictures"]
    assert "largest confusions" in found.to_text()
