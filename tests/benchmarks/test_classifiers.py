"""The study of classifiers over frozen features: its climb, its three seeds, its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.evidence import classifiers
from benchmarks.evidence.classifiers import Study, by_problem, table
from benchmarks.evidence.heads import ALL, METHODS, adjusted, class_means, judged, of_means, trained
from benchmarks.evidence.problems import Data, Groups
from benchmarks.evidence.spaces import Space, Training, frozen
from benchmarks.timing import read_rows
from ltloss import LinearSoftmaxLoss


def toy() -> Data:
    """Three classes of 400, 40 and 4 samples around the axes."""
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([400, 40, 4]))
    draw = torch.Generator().manual_seed(0)
    features = torch.eye(3)[labels] + 0.2 * torch.randn(len(labels), 3, generator=draw)
    return Data(features, labels, torch.eye(3), torch.arange(3), nn.Identity, Groups(100, 20))


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Study:
    for name in ("data", "features"):
        monkeypatch.setattr(classifiers, name, lambda folder, space, split: toy())
    monkeypatch.setitem(classifiers.SPACES, "whitened", Space("toy", "toy", 64, 4))
    for name in ("TABLE", "TUNING"):
        monkeypatch.setattr(classifiers, name, tmp_path / f"{name}.csv")
    return Study(tmp_path, [], [])


@pytest.mark.parametrize("name", ALL)
def test_every_method_learns(name: str, study: Study) -> None:
    method = ALL[name]
    network, head = trained(method, {axis: values[0] for axis, values in method.space.items()}, toy(), 64, 2, 0)
    assert judged(network, head, toy())["accuracy"] == 1.0


@pytest.mark.parametrize("name", ["linear", "logit-adjusted"])
def test_a_network_learns_beside_the_head(name: str, study: Study) -> None:
    """The labels follow from what the network has to find: the distance from the origin."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(900, 2, generator=draw)
    labels = (features.norm(dim=1) > 1.2).long()

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 8))

    data = Data(features, labels, features, labels, network, Groups(100, 20))
    values = {"lr": 0.32, **({} if name == "linear" else {"scale": 16.0})}
    found, head = trained(METHODS[name], values, data, 64, 20, 0)
    assert judged(found, head, data)["accuracy"] > 0.9


def test_a_linear_layer_starts_at_the_discriminant_of_the_means() -> None:
    data = toy()
    network, head = trained(METHODS["linear"], {"lr": 0.06, "weight_decay": 0.01}, data, 64, 0, 0)
    means = class_means(data)
    expected = 32 * (data.train @ means.T - 0.5 * means.square().sum(1))
    torch.testing.assert_close(network(data.train) @ head.weight.T + head.bias, expected)


def test_the_class_means_are_a_classifier() -> None:
    means = class_means(toy())
    torch.testing.assert_close(means[2], toy().train[-4:].mean(0))
    assert of_means(toy()) == {"accuracy": 1.0, "many": 1.0, "medium": 1.0, "few": 1.0}


def test_the_prior_is_taken_off_and_put_back() -> None:
    data, head, prior = toy(), LinearSoftmaxLoss(3, 3), (torch.tensor([400.0, 40.0, 4.0]) / 444).log()
    head.load_state_dict({"weight": torch.eye(3), "bias": prior})
    assert judged(nn.Identity(), head, data)["accuracy"] == pytest.approx(1 / 3, abs=1e-4)  # all look like the first
    assert adjusted(nn.Identity(), head, data, 1.0)["accuracy"] == 1.0
    assert torch.equal(head.bias, prior)


def test_a_study_climbs_once_and_trains_three_seeds(study: Study) -> None:
    for _ in range(2):
        study.means("whitened")
        study.tune("whitened", "linear")
        study.measure("whitened", "linear")
    assert [(row["method"], row["seed"]) for row in study.rows] == [
        ("means", "0"),
        *((name, seed) for seed in "012" for name in ("linear", "post-hoc")),
    ]
    study.rows[1]["values"] = "{}"  # as if the climb had gone on since, to where it is now
    before = len(study.rows)
    study.measure("whitened", "linear")
    assert len(study.rows) == before
    assert "{}" not in [row["values"] for row in study.rows[1:]]
    values = [row["values"] for row in study.tried if row["method"] == "linear"]
    assert len(values) == len(set(values)) >= 5
    assert [row for row in study.tried if row["method"] == "post-hoc" and json.loads(row["values"])["tau"] == 1.5]
    assert len(read_rows(classifiers.TABLE)) == len(study.rows)
    assert len(read_rows(classifiers.TUNING)) == len(study.tried)
    shown = table(study.rows, [])
    assert "| linear cross-entropy | whitened | lr=" in shown
    assert "tau=" in shown


def test_the_estimator_is_trained_beside_them(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        study.estimators("whitened")
    names = [row["method"] + row["seed"] for row in study.rows]
    assert names == ["auto0", "auto1", "auto2", "named0", "named1", "named2", "sklearn0"]
    assert {row["accuracy"] for row in study.rows[:3]} == {"1.0"}
    assert json.loads(study.rows[-2]["values"]) == {"loss": "cosine-16"}
    chosen = json.loads(study.rows[0]["values"])["loss"]
    assert f"| whitened | loss={chosen} | 100.00" in table(study.rows)


def test_a_frozen_network_gives_features_that_its_training_made() -> None:
    data = toy()._replace(network=lambda: nn.Linear(3, 8), augment="none")
    found = frozen(data, Training(32, 3))
    assert found.train.shape == (444, 8)
    assert found.test.shape == (3, 8)
    assert not found.train.requires_grad
    assert list(found.network().parameters()) == []
    untrained = frozen(data, Training(32, 0))
    assert judged_by_means(found) >= judged_by_means(untrained)
    assert torch.equal(frozen(data, Training(32, 3)).train, found.train)


def judged_by_means(data: Data) -> float:
    """How much farther apart the class means are than the features of a class."""
    means = nn.functional.normalize(class_means(data))
    inside = (nn.functional.normalize(data.train) * means[data.labels]).sum(1).mean()
    return float(inside - (means @ means.T).mean())


def test_what_lacks_to_the_best_tuned_line() -> None:
    def row(space: str, method: str, share: float) -> dict[str, str]:
        shares = dict.fromkeys(("accuracy", "many", "medium", "few"), str(share))
        return {"space": space, "method": method, "values": "{}", **shares}

    first, second = "omniglot network", "fashion network"
    rows = [row(first, "cosine", 0.5), row(first, "linear", 0.6), row(first, "auto", 0.58), row(second, "auto", 0.9)]
    rows += [row(second, "means", 0.8)]
    header, _, *lines = by_problem(rows).splitlines()
    assert header == "| method | Omniglot-LT | Fashion-MNIST-LT |"
    assert "| cosine | 50.00 | – |" in lines
    assert lines[-1] == '| points from "auto" to the best tuned line | 2.0 | -10.0 |'


def test_the_estimators_stand_in_the_table_with_one_thread() -> None:
    row = {
        "provider": "ltloss LongTailClassifier",
        "data": "icons_features256.npz",
        "threads": "1",
        "chosen": "cosine-32",
    }
    others = [{**row, "all": all_, "few": "2", "many": "3"} for all_ in ("46", "48")]
    two_threads = {**others[0], "threads": "2", "all": "99"}
    shown = table([], [*others, two_threads])
    assert (
        '| `LongTailClassifier()`, "auto" | its own | cosine-32 | 47.00 ± 1.41 | 3.00 ± 0.00 | – | 2.00 ± 0.00 |'
        in shown
    )
