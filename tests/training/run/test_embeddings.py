"""Runs over embeddings: trained, resumed, measured, compared, and what does not go with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from helpers.toys import CLASS_NAMES, toy_embeddings, toy_settings, write_embeddings

from ltloss.errors import UserError
from ltloss.training import compare
from ltloss.training.comparison.recipes import recipe
from ltloss.training.measure.evaluate import evaluate_run
from ltloss.training.model.classifier import Classifier
from ltloss.training.pages.run_report import write_report
from ltloss.training.run.prepare import prepare_data
from ltloss.training.run.run_config import RunConfig, read_settings_file
from ltloss.training.run.settings import Settings
from ltloss.training.run.trainer import TrainingResult, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embeddings(tmp_path_factory.mktemp("data") / "toy.npz")


def settings(data: Path, **changes: Any) -> dict[str, Any]:
    return {**toy_settings(data, loss="logit-adjusted"), "embedding_size": 64, **changes}


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return train(tmp_path_factory.mktemp("runs") / "run", settings(data), quiet=True)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return Classifier.load(run, "cpu").state_dict()


def test_a_run_learns_and_can_be_read_again(trained: TrainingResult, data: Path) -> None:
    assert trained.evaluation.metrics.accuracy == 1.0
    config = RunConfig.read(trained.run)
    assert (config.image_shape, config.of_embeddings, config.backbone) == ((6,), True, "linear")
    assert config.settings.embedding_size == config.embedding_size == 6
    x = toy_embeddings(20)[0].astype(np.float64)
    np.testing.assert_allclose(config.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(config.std, x.std(0), rtol=1e-12)
    assert evaluate_run(trained.run, device="cpu").metrics == trained.evaluation.metrics
    assert json.loads(trained.evaluation.to_json())["backbone"] == "linear"
    assert Settings(**read_settings_file(trained.run / "config.json")) == config.settings


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 32.0),
        ({"scale": 12.0}, 12.0),
        ({"loss_options": {"scale": 12.0}}, 12.0),
        ({"head": "mlp", "embedding_size": 8}, 8.0),  # it learns: 2 ln 3 is less
    ],
)
def test_the_scale_over_features_that_do_not_learn(data: Path, changes: dict[str, Any], scale: float) -> None:
    found = Classifier(prepare_data(Settings(**settings(data, **changes))).config).loss
    assert found.scale == scale  # type: ignore[union-attr]


def test_softmax_has_no_scale(data: Path) -> None:
    assert prepare_data(Settings(**settings(data, loss="softmax"))).config.settings.scale is None


def test_a_report_is_written(trained: TrainingResult) -> None:
    text = write_report(trained.run, device="cpu").read_text(encoding="utf-8")
    assert "features of an embedding" in text
    assert "linear head" in text
    assert not any(word in text for word in ("image shape", "small-cnn", "crop_pad"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head": "mlp", "embedding_size": 8},
        {"fused_update": True, "prototype_dtype": "bfloat16"},
        {"fused_update": True, "prototype_dtype": "float8_e4m3fn"},
        {"mixup": 0.5},
        {"loss": "softmax"},
    ],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one(changes: dict[str, Any], data: Path, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", settings(data, **changes), quiet=True)
    assert whole.evaluation.metrics.accuracy is not None
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "epoch-0002")
    train(tmp_path / "cut", {}, resume=True, quiet=True)
    found, wanted = tensors(tmp_path / "cut"), tensors(tmp_path / "whole")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_other_data_are_measured_or_refused(trained: TrainingResult, tmp_path: Path) -> None:
    x, y = toy_embeddings(5, seed=1)
    names, pixels = np.array(CLASS_NAMES), np.zeros((15, 8, 8), np.uint8)
    np.savez(tmp_path / "same.npz", x=x, y=names[y])
    np.savez(tmp_path / "wide.npz", x=np.pad(x, ((0, 0), (0, 1))), y=names[y])
    np.savez(tmp_path / "images.npz", x_train=pixels, y_train=y, x_test=pixels, y_test=y, class_names=names)
    found = evaluate_run(trained.run, str(tmp_path / "same.npz"), device="cpu")
    assert (found.split, found.metrics.images, found.metrics.accuracy) == ("all", 15, 1.0)
    with refused("wide.npz", "7", "6", error=UserError):
        evaluate_run(trained.run, str(tmp_path / "wide.npz"), device="cpu")
    with refused("images.npz", "(1, 8, 8)", "6", error=UserError):
        evaluate_run(trained.run, str(tmp_path / "images.npz"), device="cpu")


def test_a_test_split_of_another_width_is_refused(tmp_path: Path) -> None:
    data = write_embeddings(tmp_path / "data.npz", x_test=np.zeros((15, 5), np.float32))
    with refused("data.npz", "5", "6", error=UserError):
        train(tmp_path / "run", settings(data), quiet=True)


def test_changed_embeddings_cannot_be_resumed(data: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", settings(data, epochs=1), quiet=True)
    x = toy_embeddings(20)[0]
    x[7, 3] += 1e-3
    changed = write_embeddings(tmp_path / "changed.npz", x_train=x)
    with refused(str(changed), "mean", error=UserError):
        train(tmp_path / "run", {"data": str(changed), "epochs": 2}, resume=True, quiet=True)
    x_train, x_test = np.eye(60, 5, dtype=np.float32), np.eye(15, 5, dtype=np.float32)
    narrow = write_embeddings(tmp_path / "narrow.npz", x_train=x_train, x_test=x_test)
    with refused(str(narrow), "5", "6", error=UserError) as caught:
        train(tmp_path / "run", {"data": str(narrow), "epochs": 2}, resume=True, quiet=True)
    assert "--" not in str(caught.value), "it blames an option"


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"backbone": "resnet32"}, ("--backbone", "resnet32", "embeddings")),
        ({"image_size": 8}, ("--image-size", "8")),
        ({"channels": 3}, ("--channels", "3")),
        ({"augment": "crop-flip"}, ("--augment", "crop-flip")),
        ({"crop_pad": 2}, ("--crop-pad", "2")),
        ({"embedding_size": 32}, ("--embedding-size", "32", "6", "--head mlp")),
    ],
    ids=str,
)
def test_settings_of_images_are_refused(
    changes: dict[str, Any], facts: tuple[str, ...], data: Path, tmp_path: Path
) -> None:
    with refused(*facts, error=UserError):
        train(tmp_path / "run", settings(data, **changes), quiet=True)
    assert not (tmp_path / "run").exists()


def test_images_have_no_head(toy_npz: Path, tmp_path: Path) -> None:
    with refused("--head", "mlp", "images", error=UserError):
        train(tmp_path / "run", toy_settings(toy_npz, head="mlp"), quiet=True)


def test_methods_are_compared(data: Path, tmp_path: Path) -> None:
    given = {"data": str(data), "epochs": 1, "batch_size": 16, "device": "cpu"}
    found = compare(tmp_path / "out", given, ["crt", "cosine"], seeds=1, quiet=True)
    assert [run.result["last"]["accuracy"] for run in found.runs] == [1.0, 1.0]
    again = write_embeddings(tmp_path / "other.npz", x_train=toy_embeddings(20, seed=2)[0])
    compare(tmp_path / "out", {**given, "data": str(again)}, ["cosine"], seeds=1, quiet=True)
    assert len(list((tmp_path / "out" / "runs").glob("cosine-*.json"))) == 2  # other embeddings are other jobs


def test_a_recipe_of_images_is_refused_before_anything_is_trained(data: Path, tmp_path: Path) -> None:
    given = {"data": str(data), "device": "cpu"}
    with refused("--crop-pad", "2", error=UserError):
        compare(tmp_path / "out", given, ["cosine"], recipe="small", quiet=True)
    assert not (tmp_path / "out").exists()
    assert Settings(**recipe("embeddings"), **given).head == "linear"
