"""K prototypes a class, of which the nearest counts: losses, searches and outliers, beside the dense formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.refusals import refused
from torch import Tensor

import ltloss
from ltloss import functional as F
from ltloss import reference
from ltloss.optim import PrototypeSGD
from ltloss.sub_centers import dominant, nearest_of_target, outliers
from ltloss.testing import FAMILY, WITH_SUB_CENTERS, Problem, assert_same, check_loss, outcome, problem, relative_error

N, C, D = 20, 70, 13
NAMES = [name for name in FAMILY if name != "linear"]
KS = [1, 2, 3, 4, 8]


def _problem(k: int, dtype: torch.dtype = torch.float64) -> Problem:
    features, _, labels = problem(N, C, D)
    prototypes = torch.randn(C, k, D, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    return Problem(features.to(dtype), prototypes.to(dtype), labels)


def _options(name: str, dtype: torch.dtype) -> dict[str, Any]:
    return {key: one.to(dtype) if isinstance(one, Tensor) else one for key, one in FAMILY[name](C).items()}


def test_by_hand() -> None:
    """The cosines of class 0 are 0.6 and 0.8, of class 1 they are 0 and -1: log(1 + e^(2·(0 - 0.8)))."""
    prototypes = torch.tensor([[[3.0, 4.0], [4.0, 3.0]], [[0.0, 1.0], [-2.0, 0.0]]], requires_grad=True)
    loss = F.margin_cross_entropy(torch.tensor([[1.0, 0.0]]), prototypes, torch.tensor([0]), scale=2.0)
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(-1.6)), rel=1e-6)
    loss.backward()
    assert prototypes.grad is not None
    reached = prototypes.grad.abs().sum(2) > 0
    assert reached.tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("name", NAMES)
def test_the_chunked_pass_against_the_reference(name: str, k: int) -> None:
    options = _options(name, torch.float64)
    exact = outcome(_problem(k), loss=reference.margin_cross_entropy, **options)
    assert_same(outcome(_problem(k), **options), exact, 1e-12)


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("name", ["arcface", "everything", "feature_length_smoothed", "balanced_softmax"])
def test_the_kernels_against_the_reference(name: str, k: int) -> None:
    exact = outcome(_problem(k), loss=reference.margin_cross_entropy, **_options(name, torch.float64))
    with ltloss.use_backend("triton"):
        assert_same(outcome(_problem(k, torch.float32), **_options(name, torch.float32)), exact, 1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_with_classes_in_several_slabs_and_samples_in_several_chunks(backend: str) -> None:
    """A workspace of nothing: the kernels take the fewest classes and rows at a time."""
    features, prototypes, labels = torch.randn(70, 5), torch.randn(2100, 3, 5), torch.randint(2100, (70,))
    given = Problem(features, prototypes, labels)
    exact = outcome(Problem(features.double(), prototypes.double(), labels), loss=reference.margin_cross_entropy)
    with ltloss.use_backend(backend), ltloss.use_workspace(1):  # type: ignore[arg-type]
        assert_same(outcome(given), exact, 1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_of_equal_sub_centers_the_first_gets_the_gradient(backend: str) -> None:
    prototypes = torch.randn(9, 1, D).expand(9, 3, D).clone().requires_grad_()
    with ltloss.use_backend(backend):  # type: ignore[arg-type]
        F.margin_cross_entropy(torch.randn(6, D), prototypes, torch.arange(6)).backward()
    assert prototypes.grad is not None
    assert prototypes.grad[:, 0].any()
    assert not prototypes.grad[:, 1:].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_not_a_number_is_never_dropped(backend: str, place: int) -> None:
    prototypes = torch.randn(9, 3, D)
    prototypes[4, place] = math.nan
    with ltloss.use_backend(backend):  # type: ignore[arg-type]
        losses = F.margin_cross_entropy(torch.randn(6, D), prototypes, torch.arange(6), reduction="none")
    assert bool(losses.isnan().all())


@pytest.mark.parametrize("name", WITH_SUB_CENTERS)
def test_modules_keep_the_laws(name: str) -> None:
    check_loss(lambda c, d: WITH_SUB_CENTERS[name](c, d, scale=6.0))


def test_the_prior_gets_its_gradient() -> None:
    features, prototypes, labels = _problem(3)
    found, exact = (torch.linspace(-1, 0, C, dtype=torch.float64).requires_grad_() for _ in range(2))
    F.margin_cross_entropy(features, prototypes, labels, log_prior=found, label_smoothing=0.1).backward()
    reference.margin_cross_entropy(features, prototypes, labels, log_prior=exact, label_smoothing=0.1).backward()
    assert found.grad is not None
    assert exact.grad is not None
    assert relative_error(found.grad, exact.grad) < 1e-12


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_searches_find_classes(k: int, backend: str) -> None:
    features, prototypes, _ = _problem(k, torch.float32)
    prototypes[7] = prototypes[3]  # then the lowest index wins
    classes = torch.tensor([1, 3, 3, 7])
    with ltloss.use_backend("reference"):
        best, near, some = F.top_k(features, prototypes, 5), F.nearest_prototype(prototypes), None
        some = F.nearest_prototype(prototypes, classes)
    with ltloss.use_backend(backend):  # type: ignore[arg-type]
        for found, exact in (
            (F.top_k(features, prototypes, 5), best),
            (F.nearest_prototype(prototypes), near),
            (F.nearest_prototype(prototypes, classes, allow_tf32=False), some),
        ):
            assert torch.equal(found.index, exact.index)
            torch.testing.assert_close(found.cosine, exact.cosine)
        assert F.top_k(features, prototypes, C).index.sort().values.equal(torch.arange(C).expand(N, C))


def test_the_minimum_angle_has_its_gradient() -> None:
    _, prototypes, _ = _problem(3)
    counts = torch.arange(1, C + 1)
    found, exact = prototypes.clone().requires_grad_(), prototypes.clone().requires_grad_()
    F.min_angle_regularizer(found, counts).backward()
    reference.min_angle_regularizer(exact, counts).backward()
    assert found.grad is not None
    assert exact.grad is not None
    assert relative_error(found.grad, exact.grad) < 1e-9
    assert float(F.min_angle_regularizer(prototypes[:1])) == 0.0
    assert F.nearest_prototype(prototypes[:1]).index.tolist() == [-1]


def test_a_module_predicts_and_shows_its_sub_centers() -> None:
    module = ltloss.ArcFaceLoss(C, D, sub_centers=3)
    features, _, _ = _problem(3, torch.float32)
    assert module.weight.shape == (C, 3, D)
    assert "sub_centers=3" in repr(module)
    assert torch.equal(module.predict(features, 4).index, module.logits(features).topk(4).indices)
    other = ltloss.CosFaceLoss(C, D, sub_centers=3)
    with pytest.warns(UserWarning, match="hyper-parameters"):
        other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)


@pytest.mark.parametrize(("there", "here"), [(3, 1), (1, 3), (3, 2)])
def test_a_state_with_other_sub_centers_is_refused(there: int, here: int) -> None:
    saved = ltloss.ArcFaceLoss(C, D, sub_centers=there).state_dict()
    for options in ({"sub_centers": here}, *([{"dtype": torch.float8_e4m3fn}] if here == 1 else [])):
        module = ltloss.CosFaceLoss(C, D, **options)
        before = module.weight.detach().clone()
        with pytest.raises(RuntimeError, match=f"sub_centers={there} .*this CosFaceLoss has {here}: build it"):
            module.load_state_dict(saved)
        assert torch.equal(module.weight.view(torch.uint8), before.view(torch.uint8))


def test_outliers_are_away_from_the_dominant_sub_center() -> None:
    """Class 0: three samples along x, one along y. Class 1: one sample, whatever it is nearest to."""
    prototypes = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    features = torch.tensor([[1.0, 0.0], [2.0, 0.4], [1.0, 0.9], [0.1, 1.0], [0.0, 3.0], [math.nan, 0.0]])
    labels = torch.tensor([0, 0, 0, 0, 1, -100])
    index, cosine = nearest_of_target(features, prototypes, labels)
    assert index.tolist() == [1, 1, 1, 0, 1, -1]
    torch.testing.assert_close(cosine[1], torch.tensor([0.4, 2.0]) / math.hypot(2.0, 0.4))
    assert dominant(index, labels, 2, 2).tolist() == [1, 1]
    assert outliers(features, prototypes, labels).tolist() == [False, False, False, True, False, False]
    near = outliers(features, prototypes, labels, max_angle=math.radians(30))
    assert near.tolist() == [False, False, True, True, False, False]
    assert not outliers(features, prototypes[:, 0], labels).any()


def test_refusals() -> None:
    features, prototypes, labels = _problem(3, torch.float32)
    with refused("normalize_prototypes=False", "(70, 3, 13)"):
        F.margin_cross_entropy(features, prototypes, labels, normalize_prototypes=False)
    with refused("sub_centers", "8", "9"):
        F.top_k(features, torch.randn(4, 9, D))
    with refused("sub_centers", "0"):
        ltloss.ArcFaceLoss(C, D, sub_centers=0)
    with refused("sub_centers=2", "torch.float8_e4m3fn", error=TypeError):
        ltloss.ArcFaceLoss(C, D, sub_centers=2, dtype=torch.float8_e4m3fn)
    with refused("(70, 3, 13)", "torch.optim"):
        PrototypeSGD(ltloss.ArcFaceLoss(C, D, sub_centers=3), lr=0.1)
    with refused("sub_centers", error=TypeError):
        ltloss.LinearSoftmaxLoss(C, D, sub_centers=2)  # type: ignore[call-arg]
    with refused("max_angle", "90"):
        outliers(features, prototypes, labels, max_angle=90)
