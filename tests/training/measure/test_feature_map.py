from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from sklearn.decomposition import PCA

from ltloss import ArcFaceLoss, PrototypeHead
from ltloss.errors import UserError
from ltloss.training.measure.feature_map import feature_map, sample_for_map, seen_by_the_loss
from ltloss.training.model.softmax_loss import SoftmaxLoss


def test_pca_is_that_of_scikit_learn_up_to_the_sign() -> None:
    generator = np.random.default_rng(0)
    points, prototypes = generator.normal(size=(90, 6)) * [5, 1, 3, 1, 1, 1], generator.normal(size=(4, 6))
    found = feature_map(points, np.zeros(90, int), prototypes, np.arange(4), "pca")
    law = PCA(2).fit(points)
    sign = np.sign((found.images * law.transform(points)).sum(0))
    assert found.images == pytest.approx(law.transform(points) * sign)
    assert found.prototypes == pytest.approx(law.transform(prototypes) * sign)
    assert found.variance == pytest.approx(law.explained_variance_ratio_.sum())


def test_the_sign_of_an_axis_does_not_depend_on_chance() -> None:
    points = np.random.default_rng(0).normal(size=(50, 3)) * [4, 2, 1]
    found = feature_map(points, np.zeros(50, int), np.eye(3), np.arange(3), "pca")
    assert (found.prototypes[[0, 1], [0, 1]] > found.prototypes[[1, 0], [0, 1]]).all()


@pytest.mark.parametrize("shape", [(1, 4), (2, 1), (5, 1)])
def test_few_points_and_few_dimensions_have_a_map(shape: tuple[int, int]) -> None:
    points = np.random.default_rng(0).normal(size=shape)
    found = feature_map(points, np.zeros(shape[0], int), points[:1], np.zeros(1, int))
    assert (found.method, found.images.shape) == ("PCA", (shape[0], 2))
    assert np.isfinite(found.images).all()


def test_what_is_not_finite_is_left_out() -> None:
    points = np.random.default_rng(0).normal(size=(6, 3))
    points[2, 1], points[4] = np.nan, np.inf
    found = feature_map(points, np.arange(6), points[1:3], np.array([1, 2]), "pca")
    assert (found.labels.tolist(), found.prototype_labels.tolist()) == ([0, 1, 3, 5], [1])
    with refused("points", "finite", "1 rows"):
        feature_map(points[2:3], np.zeros(1, int), points[:1], np.zeros(1, int))


def test_the_sample_is_bounded_and_holds_the_marked_classes() -> None:
    labels = np.full(50_000, 7)
    labels[1000:1100], labels[4001] = 3, 2  # numbers that the even sample does not hit all
    numbers, even = sample_for_map(labels, [3, 2, 9])
    assert even.sum() == 2000
    assert (numbers[even][[0, -1]] == [0, 49_999]).all()
    assert (labels[numbers] == 3).sum() >= 60
    assert 4001 in numbers
    assert len(numbers) <= 2000 + 61
    assert sample_for_map(labels[:3], [7])[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("head", "unit"),
    [
        (PrototypeHead(5, 4), True),
        (ArcFaceLoss(5, 4, sub_centers=3), True),
        (PrototypeHead(5, 4, normalize_features=False), False),
        (SoftmaxLoss(5, 4), False),
    ],
    ids=["cosine", "centers", "length", "softmax"],
)
def test_points_are_as_the_loss_sees_them(head: torch.nn.Module, unit: bool) -> None:
    features = torch.randn(8, 4) * 7
    points, prototypes, owner = seen_by_the_loss(head, features, [4, 1])
    if unit:
        features = features / features.norm(dim=1, keepdim=True)
    torch.testing.assert_close(points, features.double(), rtol=1e-5, atol=1e-6)
    lengths = torch.full((len(prototypes),), float(points.norm(dim=1).mean()), dtype=torch.float64)
    torch.testing.assert_close(prototypes.norm(dim=1), lengths)
    weight = head.weight.detach().double()[[4, 1]].reshape(-1, 4)  # type: ignore[union-attr, index]
    assert torch.nn.functional.cosine_similarity(prototypes, weight).min() > 1 - 1e-9
    assert owner.tolist() == ([4, 4, 4, 1, 1, 1] if len(prototypes) == 6 else [4, 1])


def test_json_names_the_classes() -> None:
    found = feature_map(np.eye(3) * [3, 2, 1], np.array([0, 1, 1]), np.eye(3)[:1], np.array([1]), "pca")
    stored = json.loads(found.to_json(("a", "b")))
    assert [name for *_, name in stored["images"]] == ["a", "b", "b"]
    assert np.array([place[:2] for place in stored["images"]]) == pytest.approx(found.images, rel=1e-4)
    assert (stored["method"], stored["prototypes"][0][2]) == ("PCA", "b")


def test_umap_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    points = np.random.default_rng(0).normal(size=(30, 3))
    given = points, np.zeros(30, int), points[:1], np.zeros(1, int)
    assert feature_map(*given).method == "PCA"
    with pytest.raises(UserError, match="ltloss\\[map\\]"):
        feature_map(*given, "umap")


@pytest.mark.slow
def test_umap_is_the_same_each_time() -> None:
    pytest.importorskip("umap.umap_")  # what an uninstallation leaves has the name "umap" too
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 2
    points = generator.normal(size=(60, 5)) + 20 * labels[:, None]
    first, again = (feature_map(points, labels, points[:2] + 0.1, np.arange(2)) for _ in range(2))
    assert first.method == "UMAP"
    assert np.array_equal(first.images, again.images)
    assert np.array_equal(first.prototypes, again.prototypes)
    near = np.linalg.norm(first.images[:, None] - first.prototypes, axis=2).argmin(1)
    assert (near == labels).all()
