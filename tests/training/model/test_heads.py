"""What stands between embeddings and prototypes, and where a training over embeddings starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.toys import CLASS_NAMES, toy_embeddings

from ltloss.training.data.embeddings import ArrayEmbeddings
from ltloss.training.model import heads
from ltloss.training.model.classifier import Classifier
from ltloss.training.model.start import start_from
from ltloss.training.run.prepare import run_config
from ltloss.training.run.settings import Settings


def source(per_class: int, seed: int = 0) -> ArrayEmbeddings:
    x, y = toy_embeddings(per_class, seed)
    return ArrayEmbeddings(x, np.arange(len(x)), y, CLASS_NAMES, "toy")


def started(data: ArrayEmbeddings, **settings: Any) -> Classifier:
    classifier = Classifier(run_config(Settings(**{"data": "toy.npz", "loss": "cosine", **settings}), data))
    start_from(classifier, data)
    return classifier.eval()


@torch.inference_mode()
def covariance_within(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    centred = [features[labels == c] - features[labels == c].mean(0) for c in range(3)]
    rows = torch.cat(centred).double()
    return rows.T @ rows / len(rows)


def test_a_linear_head_whitens_within_the_classes() -> None:
    data = source(300)
    classifier = started(data)
    standardised = (data.batch(np.arange(len(data))).double() - classifier.mean) / classifier.std
    within, matrix = covariance_within(standardised, torch.from_numpy(data.labels)), classifier.state_dict()
    shrunk = 0.99 * within + 0.01 * within.diagonal().diag()
    white = matrix["backbone.matrix"].double()
    torch.testing.assert_close(white.T @ shrunk @ white, torch.eye(6).double(), rtol=0, atol=1e-3)
    features = classifier.features(data.batch(np.arange(len(data)))).double()
    torch.testing.assert_close(features, standardised @ white, rtol=1e-4, atol=1e-4)


def test_wide_embeddings_are_divided_by_their_deviations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "WIDEST", 5)
    monkeypatch.setattr("ltloss._estimator.space.WIDEST", 5)
    data = source(500)
    classifier = started(data)
    assert classifier.state_dict()["backbone.matrix"].shape == (6,)
    features = classifier.features(data.batch(np.arange(len(data)))).detach()
    variance = covariance_within(features, torch.from_numpy(data.labels)).diagonal()
    torch.testing.assert_close(variance, torch.ones(6, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", ["cosine", "softmax", "long-tail", "cosine-space"])
def test_a_linear_head_starts_at_the_class_means(loss: str) -> None:
    classifier, other = started(source(50), loss=loss), source(20, seed=1)
    with torch.inference_mode():
        logits = classifier(other.batch(np.arange(60)))
    assert (logits.argmax(1).numpy() == other.labels).mean() > 0.95
    assert classifier.loss.weight.shape == (3, 6)


def test_prototypes_of_several_centres_stay_as_they_were_drawn() -> None:
    classifier = started(source(5), loss_options={"sub_centers": 2})
    assert len({tuple(row) for row in classifier.loss.weight.detach().flatten(0, 1).tolist()}) == 6


def test_a_class_mean_of_zero_leaves_a_drawn_direction() -> None:
    x = np.array([[1, 0], [-1, 0], [1, 1], [-1, -1]], np.float32)
    classifier = started(ArrayEmbeddings(x, np.arange(4), np.array([0, 0, 1, 1]), ("a", "b"), "x"))
    assert classifier.loss.weight.norm(dim=1).tolist() == pytest.approx([1, 1])


def test_a_linear_head_is_one_under_autocast_too() -> None:
    data = source(50)
    classifier, x = started(data), data.batch(np.arange(60))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = classifier.features(x)
    assert torch.equal(rounded, classifier.features(x))


def test_an_mlp_has_one_hidden_layer() -> None:
    classifier = started(source(5), head="mlp", embedding_size=4)
    shapes = {name: tuple(p.shape) for name, p in classifier.backbone.named_parameters() if p.ndim > 1}
    assert shapes == {"hidden.weight": (6, 6), "embedding.weight": (4, 6)}
    assert classifier.loss.weight.shape == (3, 4)
