"""torch.compile sees through everything: opcheck of the operators, and every module as one graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import ltloss
from ltloss.margins import Margin, Objective
from ltloss.ops import logsumexp, margin_cross_entropy, prototype_search
from ltloss.ops.labels import OPERATOR as checked_labels
from ltloss.testing import MODULES, WITH_LENGTHS, WITH_SUB_CENTERS, problem

pytestmark = pytest.mark.slow

# Compiling reorders float32 sums of some ten products.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
ALL = MODULES | WITH_LENGTHS | WITH_SUB_CENTERS


def _problem(n: int = 4, requires_grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    features, prototypes, labels = problem(n, 6, 3, dtype=torch.float32, ignored=False)
    return features.requires_grad_(requires_grad), prototypes.requires_grad_(requires_grad), labels


OPERATORS = {**margin_cross_entropy.OPERATORS, **logsumexp.OPERATORS, **prototype_search.OPERATORS}


def _loss_arguments(reduction: str = "mean", normalize: bool = True, n: int = 4) -> tuple[Any, ...]:
    vector = torch.linspace(0.1, 0.4, 6)
    objective = Objective(
        Margin(vector, 0.2, 1.1), -vector, vector + 1, 9.0, normalize, label_smoothing=0.1, reduction=reduction
    )
    return (*_problem(n, requires_grad=False), *objective.flat())


def _margin_arguments() -> tuple[Any, ...]:
    objective = Objective(Margin(0.3, beyond_pi="arcface"), scale=9.0, reduction="sum")
    vectors = (torch.rand(3, 4), torch.empty(0), torch.rand(4), torch.empty(0), torch.tensor([0, 1, 5, -100]))
    return (*vectors, *objective.flat(), 6)


def _gradient_arguments(needs: list[bool], n: int = 4) -> tuple[Any, ...]:
    _, coefficients, inverse, bound, factor = OPERATORS["margin_cross_entropy"]["torch"](*_loss_arguments(n=n))
    given = _problem(n, requires_grad=False)
    options = 9.0, True, True, True, -100, None, None
    return (torch.tensor(0.7), *given, None, coefficients, factor, inverse, bound, *options, needs)


def _bend() -> list[Tensor]:
    return [torch.linspace(-1.0, 1.0, 4), torch.tensor([0.0, 0.3, 0.1])]


def _kept_arguments(needs: list[bool]) -> tuple[Any, ...]:
    *_, exponentials, shifts = OPERATORS["margin_cross_entropy_keeping"]["torch"](*_loss_arguments())
    return (exponentials, shifts, *_gradient_arguments(needs))


_COSINES = (*_problem(requires_grad=False), None, 9.0, True, True)


def _with_centers(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same with three sub-centres a class."""
    features, prototypes, *rest = arguments
    return (features, torch.stack([prototypes, prototypes.flip(0), -prototypes], 1), *rest)


def _gradients_with_centers() -> tuple[Any, ...]:
    _, coefficients, inverse, bound, factor = OPERATORS["margin_cross_entropy"]["torch"](
        *_with_centers(_loss_arguments())
    )
    given = _with_centers(_problem(requires_grad=False))
    options = 9.0, True, True, True, -100, None, None
    return (torch.tensor(0.7), *given, None, coefficients, factor, inverse, bound, *options, [True, True, True])


CASES: dict[str, Any] = {
    "margin_cross_entropy": _loss_arguments,
    "margin_cross_entropy_keeping": _loss_arguments,
    "margin_cross_entropy none": lambda: _loss_arguments("none", False),
    "margin_cross_entropy empty": lambda: _loss_arguments("sum", n=0),
    "margin_loss": _margin_arguments,
    "logsumexp_stats": lambda: (*_COSINES, False, -100, None, None),
    "logsumexp_stats prior": lambda: (
        *_problem(requires_grad=False),
        torch.randn(6),
        9.0,
        True,
        True,
        True,
        None,
        None,
        None,
    ),
    "logsumexp_stats length": lambda: (*_problem(requires_grad=False), None, 9.0, False, True, True, -100, None, None),
    "logsumexp_stats linear": lambda: (*_problem(requires_grad=False), None, 9.0, False, False, True, -100, None, None),
    "logsumexp_stats labels": lambda: (
        *_COSINES[:2],
        torch.tensor([[0, 5], [1, -100], [-100, 2], [3, 3]]),
        *_COSINES[3:],
        True,
        -100,
        None,
        None,
    ),
    "logsumexp_stats bend": lambda: (*_COSINES, False, -100, *_bend()),
    "logsumexp_stats empty": lambda: (
        *_problem(0, False),
        None,
        9.0,
        True,
        True,
        False,
        -100,
        None,
        None,
    ),
    "logsumexp_stats_keeping": lambda: (*_COSINES, True, -100, None, None),
    "logsumexp_gradients": lambda: _gradient_arguments([True, True, True]),
    "logsumexp_gradients_of_kept": lambda: _kept_arguments([True, True, True]),
    "logsumexp_gradients_of_kept features": lambda: _kept_arguments([True, False, False]),
    "logsumexp_gradients features": lambda: _gradient_arguments([True, False, False]),
    "logsumexp_gradients prototypes": lambda: _gradient_arguments([False, True, False]),
    "nearest_prototype": lambda: (_problem(requires_grad=False)[1], None, False),
    "nearest_prototype rows": lambda: (_problem(requires_grad=False)[1], torch.tensor([0, 3, 3]), True),
    "nearest_prototype_gradient": lambda: (torch.randn(6), _problem(0, False)[1], None, torch.arange(6).flip(0)),
    "top_k": lambda: (*_problem(requires_grad=False)[:2], 3),
    "margin_cross_entropy sub-centres": lambda: _with_centers(_loss_arguments()),
    "logsumexp_stats sub-centres": lambda: _with_centers((*_COSINES, True, -100, None, None)),
    "logsumexp_gradients sub-centres": lambda: _gradients_with_centers(),
}


@pytest.mark.parametrize("case", CASES)
def test_operator(case: str) -> None:
    """Schema, fake tensors, and tracing with dynamic shapes."""
    torch.library.opcheck(OPERATORS[case.split()[0]]["torch"], CASES[case]())


def test_the_operator_of_labels() -> None:
    torch.library.opcheck(checked_labels, (torch.tensor([0, 3, -100], dtype=torch.int32), 6, -100, "labels"))


@pytest.mark.parametrize("needs", [[True, False, False], [False, True, True]])
def test_gradients_of_an_empty_batch_have_the_right_shapes(needs: list[bool]) -> None:
    real = OPERATORS["logsumexp_gradients"]["torch"](*_gradient_arguments(needs, 0))
    assert [tuple(t.shape) for t in real] == [
        (0, 3) if needs[0] else (0,),
        *([(6, 3), (6,)] if needs[1] else [(0,), (0,)]),
    ]


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
    eager = ALL[name](6, 3, **options)
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True, dynamic=dynamic, backend=backend)
    for n in (7, 12) if dynamic else (7,):  # fullgraph: a graph break is an error
        for ours, plain in zip(_step(compiled, run, *_batch(n)), _step(eager, eager, *_batch(n)), strict=True):
            torch.testing.assert_close(ours, plain, **CLOSE)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_module_is_one_graph(name: str, dynamic: bool) -> None:
    _check(name, "aot_eager", dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["ArcFaceLoss", "CosineSpaceLoss"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_kept_exponentials_in_one_graph(backend: str, name: str, dynamic: bool) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter's tensors are on the CPU")
    with ltloss.use_workspace(1 << 20, keep_exponentials=True), ltloss.use_backend(backend):
        _check(name, "aot_eager", dynamic)


def test_options_in_one_graph() -> None:
    _check("CombinedMarginLoss", "aot_eager", True, label_smoothing=0.1, normalize_features=False, scale=2.0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("sub_centers", [1, 3])
def test_angles_in_one_graph(sub_centers: int, dynamic: bool) -> None:
    for classes in ("all", "batch"):
        options = {"min_angle_classes": classes, "min_angle_weight": 0.5, "sub_centers": sub_centers}
        _check("LongTailLoss", "aot_eager", dynamic, **options)


def test_with_the_default_compiler() -> None:
    _check("ArcFaceLoss", "inductor", False)


@pytest.mark.parametrize("name", ["ArcFaceLoss", "ArcFaceLoss with sub-centres"])
def test_prediction_is_one_graph(name: str) -> None:
    torch.compiler.reset()
    module = ALL[name](6, 3)
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
