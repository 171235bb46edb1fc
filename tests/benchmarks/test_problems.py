"""What the studies hold out, and in which space features are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.evidence import problems
from benchmarks.evidence.problems import (
    Data,
    Groups,
    accuracy,
    batches,
    fewer,
    for_validation,
    held_out,
    start_at_means,
    whitened,
)


def toy(counts: list[int], width: int = 2) -> Data:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    draw = torch.Generator().manual_seed(0)
    train = torch.randn(len(labels), width, generator=draw)
    return Data(train, labels, train[:1], labels[:1], nn.Identity, Groups(4, 2))


def test_one_sample_of_each_class_with_three_or_more_is_held_out() -> None:
    labels = np.array([0, 1, 1, 2, 2, 2])
    rest, one = held_out(labels, "test")
    assert labels[one].tolist() == [2]
    assert sorted([*rest, *one]) == list(range(6))


def test_validation_takes_at_most_three_and_a_third_of_a_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = toy([2, 3, 7, 30])
    monkeypatch.setattr(problems, "DATA", {"toy": lambda folder: data})
    found = for_validation("toy", tmp_path)
    assert torch.bincount(found.test_labels).tolist() == [0, 1, 2, 3]
    assert torch.bincount(found.labels).tolist() == [2, 2, 5, 27]
    both = torch.cat([found.train, found.test])
    assert torch.equal(both[:, 0].sort().values, data.train[:, 0].sort().values)


@pytest.mark.parametrize(("name", "file", "each"), [("omniglot", "omniglot28", 15), ("fashion", "fashion_mnist", 2000)])
def test_a_long_tail_is_cut_from_what_validation_leaves(name: str, file: str, each: int, tmp_path: Path) -> None:
    classes = 4
    labels = np.repeat(np.arange(classes), each)
    images = (np.arange(len(labels))[:, None, None] % 251 * np.ones((1, 4, 4))).astype(np.uint8)
    few = slice(None, None, each // 5)
    np.savez(tmp_path / f"{file}.npz", x_train=images, y_train=labels, x_test=images[few], y_test=labels[few])
    whole, held = problems.DATA[name](tmp_path), for_validation(name, tmp_path)
    spare = {"omniglot": 3, "fashion": 1000}[name]
    assert torch.bincount(whole.labels).tolist()[0] == each
    assert len(whole.test) == 5 * classes
    assert torch.bincount(held.labels).tolist()[0] == each - spare
    assert torch.bincount(held.test_labels).tolist() == [spare] * classes
    assert torch.bincount(held.labels)[-1] == max(1, (each - spare) // {"omniglot": 15, "fashion": 100}[name])


def test_fewer_keeps_one_class_of_so_many() -> None:
    found = fewer(toy([1, 2, 3, 4, 5]), 2)
    assert torch.bincount(found.labels).tolist() == [1, 3, 5]
    assert torch.equal(found.train[1:4], toy([1, 2, 3, 4, 5]).train[3:6])
    assert found.test_labels.tolist() == [0]


def test_whitened_features_have_the_covariance_within_the_classes_that_the_estimator_gives_them() -> None:
    data = toy([400, 400])
    data = data._replace(train=data.train @ torch.tensor([[3.0, 1.0], [0.0, 0.5]]) + 5.0 * data.labels[:, None])
    found = whitened(data).train
    within = torch.cat([part - part.mean(0) for part in (found[:400], found[400:])])
    torch.testing.assert_close(within.T @ within / len(within), torch.eye(2) / 2, atol=0.05, rtol=0)


def test_each_pass_draws_every_sample_once_but_for_the_last_ones() -> None:
    drawn = list(batches(7, 3, 4, torch.Generator().manual_seed(0)))
    assert len(drawn) == 4
    assert all(len(set(torch.cat(drawn[i : i + 2]).tolist())) == 6 for i in (0, 2))


def test_prototypes_start_at_the_means_of_the_directions() -> None:
    head = nn.Linear(2, 2)
    samples = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    start_at_means(head, nn.Identity(), samples, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(head.weight.data, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


def test_accuracy_is_told_by_the_training_samples_of_the_class() -> None:
    from ltloss import CosineSoftmaxLoss

    head = CosineSoftmaxLoss(3, 3)
    head.load_state_dict({"weight": torch.eye(3)})
    test, labels = torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 1, 1, 2])
    found = accuracy(nn.Identity(), head, test, labels, torch.tensor([9, 3, 1]), Groups(many=4, few=2))
    assert found == {"accuracy": 0.75, "many": 1.0, "medium": 0.5, "few": 1.0}
