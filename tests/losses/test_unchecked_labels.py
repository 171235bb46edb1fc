"""A label that is no class, where nobody looks at labels (on a GPU): the loss of that sample is NaN, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

import ltloss
from ltloss.ops import labels as labels_operator
from ltloss.soft_labels import takes_soft_labels
from ltloss.testing import MODULES, WITH_LENGTHS, WITH_SUB_CENTERS, problem

N, C, D = 8, 12, 5
BAD = (2, 5)
ALL = MODULES | WITH_LENGTHS | WITH_SUB_CENTERS


@pytest.fixture(autouse=True, params=["torch", pytest.param("triton", marks=pytest.mark.slow)])
def unchecked(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "triton":
        pytest.importorskip("triton")
    with mock.patch.object(labels_operator, "_check"), ltloss.use_backend(request.param):
        yield


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", [name for name in ALL if name != "CosineSpaceLoss"])
def test_only_its_own_loss_is_nan(name: str, weighted: bool) -> None:
    given = problem(N, C, D, dtype=torch.float32, ignored=False)
    labels = given.labels.clone()
    labels[list(BAD)] = torch.tensor([C, C + 700])
    options = {"class_weight": torch.linspace(0.5, 1.0, C)} if weighted else {}
    module = ALL[name](C, D, reduction="none", **options)
    features = given.features.clone().requires_grad_()
    for _ in range(2):  # what the first step leaves behind must not spoil the next
        loss = module(features, labels)
        assert loss.isnan().nonzero().flatten().tolist() == list(BAD)
    loss[~loss.isnan()].sum().backward()
    assert module(given.features, given.labels).isfinite().all()


def test_the_centres_leave_it_out() -> None:
    given = problem(N, C, D, dtype=torch.float32, ignored=False)
    labels = given.labels.clone()
    labels[list(BAD)] = torch.tensor([C, C + 700])
    module = MODULES["CosineSpaceLoss"](C, D)
    assert module(given.features, labels).isnan()
    without = MODULES["CosineSpaceLoss"](C, D)
    without(given.features, labels.masked_fill(labels >= C, without.ignore_index))
    assert all(torch.equal(*pair) for pair in zip(module.buffers(), without.buffers(), strict=True))
    assert module(given.features, given.labels).isfinite()


@pytest.mark.parametrize("name", [name for name in MODULES if takes_soft_labels(MODULES[name](C, D))])
def test_among_several_labels(name: str) -> None:
    given = problem(N, C, D, dtype=torch.float32, ignored=False)
    labels = torch.stack([given.labels, given.labels.roll(1)], 1)
    labels[BAD[0], 0], labels[BAD[1], 1] = C, C + 700
    module, weight = MODULES[name](C, D), torch.full((N, 2), 0.5)
    assert module(given.features, labels, label_weight=weight).isnan()
    good = [i for i in range(N) if i not in BAD]
    assert module(given.features[good], labels[good], label_weight=weight[good]).isfinite()
