"""torch.compile sees through everything: opcheck of the operators, and every module as one graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ltloss import autograd, ops
from ltloss.testing import MODULES, problem

assert autograd is not None  # importing it attaches the gradients

# Compiling reorders float32 sums of some ten products.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def _problem(n: int = 4, requires_grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    features, prototypes, labels = problem(n, 6, 3, dtype=torch.float32, ignored=False)
    return features.requires_grad_(requires_grad), prototypes.requires_grad_(requires_grad), labels


def _backward_arguments(needs: list[bool], with_sum: bool) -> tuple[Any, ...]:
    features, prototypes, labels = _problem(requires_grad=False)
    r, _, _, x_inverse, w_inverse = ops.cosine_logsumexp(features, prototypes, labels, None, 9.0, True, with_sum)
    grad_sum = torch.randn(4) if with_sum else None
    return (
        torch.randn(4),
        torch.randn(4),
        grad_sum,
        features,
        prototypes,
        labels,
        None,
        r,
        x_inverse,
        w_inverse,
        9.0,
        True,
        needs,
    )


OPERATORS: dict[str, Any] = {
    "cosine_logsumexp": lambda: (*_problem(), None, 9.0, True, False),
    "cosine_logsumexp prior": lambda: (*_problem(), torch.randn(6), 9.0, True, True),
    "cosine_logsumexp length": lambda: (*_problem(), None, 9.0, False, True),
    "cosine_logsumexp empty": lambda: (*_problem(0), None, 9.0, True, False),
    "cosine_logsumexp_backward": lambda: _backward_arguments([True, True], False),
    "cosine_logsumexp_backward features": lambda: _backward_arguments([True, False], True),
    "cosine_logsumexp_backward prototypes": lambda: _backward_arguments([False, True], False),
    "nearest_prototype": lambda: (_problem()[1], None, False),
    "nearest_prototype rows": lambda: (_problem()[1], torch.tensor([0, 3, 3]), True),
    "nearest_prototype_backward": lambda: (torch.randn(6), _problem(0, False)[1], None, torch.arange(6).flip(0)),
    "top_k": lambda: (*_problem(requires_grad=False)[:2], 3),
    "checked_labels": lambda: (torch.tensor([0, 3, -100], dtype=torch.int32), 6, -100),
}  # fmt: skip


@pytest.mark.parametrize("case", OPERATORS)
def test_operator(case: str) -> None:
    """Schema, fake tensors, autograd registration, and tracing with dynamic shapes."""
    torch.library.opcheck(getattr(ops, case.split()[0]), OPERATORS[case]())


@pytest.mark.parametrize("needs", [[True, False], [False, True]])
def test_fake_backward_of_an_empty_batch_has_the_right_shapes(needs: list[bool]) -> None:
    features, prototypes, labels = _problem(0, requires_grad=False)
    r, _, _, x_inverse, w_inverse = ops.cosine_logsumexp(features, prototypes, labels, None, 9.0, True, False)
    grad = torch.zeros(0)
    arguments = (grad, grad, None, features, prototypes, labels, None, r, x_inverse, w_inverse, 9.0, True, needs)
    real = ops.cosine_logsumexp_backward(*arguments)
    assert [tuple(t.shape) for t in real] == [(0, 3) if needs[0] else (0,), (6, 3) if needs[1] else (0,)]


def _step(module: torch.nn.Module, run: Any, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    module.zero_grad()
    leaf = features.clone().requires_grad_()
    loss = run(leaf, labels)
    loss.backward()
    return loss.detach(), leaf.grad, module.weight.grad.clone()


def _batch(n: int) -> tuple[Tensor, Tensor]:
    features, _, labels = problem(n, 6, 3, dtype=torch.float32)
    return features, labels


def _check(name: str, backend: str, dynamic: bool, **options: Any) -> None:
    torch.compiler.reset()
    eager = MODULES[name](6, 3, **options)
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True, dynamic=dynamic, backend=backend)
    for n in (7, 12) if dynamic else (7,):  # fullgraph: a graph break is an error
        for ours, plain in zip(_step(compiled, run, *_batch(n)), _step(eager, eager, *_batch(n)), strict=True):
            torch.testing.assert_close(ours, plain, **CLOSE)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_module_is_one_graph(name: str, dynamic: bool) -> None:
    _check(name, "aot_eager", dynamic)


def test_options_in_one_graph() -> None:
    _check("CombinedMarginLoss", "aot_eager", True, label_smoothing=0.1, normalize_features=False, scale=2.0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_angles_of_the_batch_in_one_graph(dynamic: bool) -> None:
    _check("LongTailLoss", "aot_eager", dynamic, min_angle_rows="batch", min_angle_weight=0.5)


def test_with_the_default_compiler() -> None:
    _check("ArcFaceLoss", "inductor", False)


def test_prediction_is_one_graph() -> None:
    torch.compiler.reset()
    module = MODULES["ArcFaceLoss"](6, 3)
    features, _ = _batch(7)
    run = torch.compile(lambda x: module.predict(x, k=2), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(features).index, module.predict(features, k=2).index)


def test_centres_move_in_the_compiled_module_too() -> None:
    torch.compiler.reset()
    eager = MODULES["CosineSpaceLoss"](6, 3)
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        features, _, labels = problem(7, 6, 3, dtype=torch.float32, seed=seed)
        run(features, labels), eager(features, labels)
    assert int(compiled.step) == 2
    torch.testing.assert_close(compiled.centers.centers, eager.centers.centers)
    assert torch.equal(compiled.centers.counts, eager.centers.counts)
