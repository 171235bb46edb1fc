"""On the kernels nothing looks at the data, so that on a GPU the host never waits: seen in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.interpreter import opaque_launches
from helpers.kernel_problems import DEVICE
from helpers.looks import Looks
from torch import Tensor

import ltloss
from ltloss import contrastive, extend, functional, optim
from ltloss.ops import labels as labels_operator
from ltloss.testing import MODULES, WITH_LENGTHS, WITH_SUB_CENTERS, problem, watching

pytestmark = [pytest.mark.slow, pytest.mark.skipif(DEVICE != "cpu", reason="the GPU tells it itself: `make gpu`")]

N, C, D = 8, 12, 5
ALL = MODULES | WITH_LENGTHS | WITH_SUB_CENTERS


@pytest.fixture(autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    """Labels are not checked, and a launch is opaque: the interpreter looks at every entry."""
    with mock.patch.object(labels_operator, "_check"), opaque_launches():
        yield


def _leaves() -> tuple[Tensor, Tensor, Tensor]:
    features, prototypes, labels = problem(N, C, D, dtype=torch.float32, ignored=False)
    return features.requires_grad_(), prototypes.requires_grad_(), labels


def _looks(run: Callable[[], Any]) -> list[str]:
    with watching(Looks()) as mode:
        run()
    found: list[str] = mode.found
    return found


@pytest.mark.parametrize("name", ALL)
def test_a_step_of_every_module(name: str) -> None:
    module = ALL[name](C, D)
    features, _, labels = _leaves()
    assert _looks(lambda: module(features, labels).backward()) == []


@pytest.mark.parametrize("name", [name for name in ALL if name not in WITH_LENGTHS])
def test_a_prediction_of_every_module(name: str) -> None:
    module = ALL[name](C, D)
    features, *_ = _leaves()
    assert _looks(lambda: module.predict(features, k=2)) == []


SCALE = torch.tensor(3.0)  # a temperature that is no longer learned
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "scale as a tensor": lambda x, w, y: extend.logsumexp_stats(x, w, y, scale=SCALE).logsumexp.sum(),
    "scale per sample": lambda x, w, y: extend.logsumexp_stats(x, w, y, scale=SCALE.expand(N)).logsumexp.sum(),
    "log prior": lambda x, w, y: functional.margin_cross_entropy(x, w, y, log_prior=torch.linspace(-2.0, 0.0, C)),
    "class weight": lambda x, w, y: functional.margin_cross_entropy(x, w, y, class_weight=torch.linspace(0.5, 1.0, C)),
    "info_nce": lambda x, w, _: contrastive.info_nce(x, w[:N], scale=SCALE),
    "supervised_contrastive": lambda x, w, y: contrastive.supervised_contrastive(x, y, w, torch.arange(C), scale=SCALE),
    "nearest_prototype": lambda x, w, _: functional.nearest_prototype(w).cosine.sum(),
    "min_angle_regularizer": lambda x, w, _: functional.min_angle_regularizer(w),
}


@pytest.mark.parametrize("name", CALLS)
def test_functions(name: str) -> None:
    leaves = _leaves()
    assert _looks(lambda: CALLS[name](*leaves).backward()) == []


@pytest.mark.parametrize("build", [optim.PrototypeSGD, optim.PrototypeAdamW, optim.PrototypeAdagrad])
def test_the_backward_of_a_fused_update(build: Callable[..., torch.optim.Optimizer]) -> None:
    """Its ``step()`` counts skipped steps where counting costs nothing."""
    module = ltloss.ArcFaceLoss(C, D)
    optimizer = build(module, lr=0.1)
    features, _, labels = _leaves()
    optimizer.zero_grad()
    assert _looks(lambda: module(features, labels).backward()) == []
    optimizer.step()


def test_the_watch_sees_a_look() -> None:
    mask = torch.tensor([True, False])
    found = _looks(lambda: (float(mask.sum()), mask[mask], mask.nonzero()))
    assert [name.split(".")[1] for name in found] == ["_local_scalar_dense", "index", "nonzero"]
