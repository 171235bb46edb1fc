"""Losses that change the logits of other classes: CurricularFace and the inter-class filter, densely in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.refusals import refused
from torch import Tensor
from torch.nn import functional

import ltloss
from ltloss import ArcFaceLoss, CurricularFaceLoss, InterclassFilterLoss
from ltloss.extend import Bend, logsumexp_stats, margin_losses, reduce_losses
from ltloss.testing import Outcome, assert_same, problem, relative_error

C, D, SCALE, MARGIN = 60, 5, 6.0, 0.5
X, W, Y = problem(12, C, D, ignored=False)
TARGET = torch.arange(C) == Y[:, None]


def _cosines(x: Tensor, weight: Tensor) -> Tensor:
    return functional.normalize(x) @ functional.normalize(weight).t()


def _curricular(x: Tensor, weight: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (N,) and which classes are hard, by equations 6 to 8 of the paper."""
    cosine = _cosines(x, weight)
    angle = cosine[TARGET].acos()
    with_margin = (angle + MARGIN).cos()
    hard = ~TARGET & (cosine > with_margin[:, None])
    beyond = angle + MARGIN > math.pi
    target = torch.where(beyond, angle.cos() - MARGIN * math.sin(MARGIN), with_margin)
    logits = torch.where(hard, cosine * (t + cosine), torch.where(TARGET, target[:, None], cosine))
    return functional.cross_entropy(SCALE * logits, Y, reduction="none"), hard


def test_curricularface_is_its_formula_and_its_gradient() -> None:
    module = CurricularFaceLoss(C, D, scale=SCALE, margin=MARGIN, momentum=0.9).double()
    module.load_state_dict({"weight": W, "mean_cosine": torch.tensor(0.25)})
    x, weight = X.clone().requires_grad_(), W.clone().requires_grad_()
    t = 0.9 * 0.25 + 0.1 * _cosines(X, W)[TARGET].mean()
    losses, hard = _curricular(x, weight, t)
    assert 0.2 < float(hard.double().mean()) < 0.8, "some classes are hard and some are not"
    losses.mean().backward()
    expected = Outcome(losses.mean().detach(), x.grad, weight.grad)
    leaf = X.clone().requires_grad_()
    found = module(leaf, Y)
    found.backward()
    assert relative_error(module.mean_cosine, t) < 1e-6
    assert_same(Outcome(found.detach(), leaf.grad, module.weight.grad), expected, 1e-6)  # the mean is kept in float32


def test_the_mean_follows_the_samples_that_count_in_training() -> None:
    module = CurricularFaceLoss(C, D, momentum=0.5)
    x, y = X.float(), Y.clone()
    y[3:] = -100
    x[5] = torch.nan
    cosine = _cosines(x[:3], module.weight.detach())[TARGET[:3]].mean()
    module(x, y)
    assert float(module.mean_cosine) == pytest.approx(float(cosine) / 2, rel=1e-5)
    module.eval()
    module(x, y)
    module.train()
    module(x, torch.full_like(y, -100))
    assert float(module.mean_cosine) == pytest.approx(float(cosine) / 2, rel=1e-5)
    module.reset_parameters()
    assert float(module.mean_cosine) == 0.0


def test_a_margin_per_class_moves_the_threshold_of_its_samples() -> None:
    margin = torch.linspace(0.1, 0.9, C)
    module = CurricularFaceLoss(C, D, scale=SCALE, momentum=1.0, reduction="none").double()
    module.angular_margin = margin
    for i in range(3):
        alone = CurricularFaceLoss(C, D, scale=SCALE, margin=float(margin[Y[i]]), momentum=1.0).double()
        alone.load_state_dict({"weight": module.weight, "mean_cosine": module.mean_cosine})
        with torch.no_grad():
            assert float(module(X, Y)[i]) == pytest.approx(float(alone(X[i : i + 1], Y[i : i + 1])), rel=1e-6)


def test_the_filter_leaves_near_classes_out() -> None:
    """By hand: cosines 1 (target), 0.8 (beyond the threshold) and 0: log(1 + e^-2)."""
    module = InterclassFilterLoss(3, 2, scale=2.0, filter_threshold=0.5)
    module.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])})
    x, y = torch.tensor([[2.0, 0.0]], requires_grad=True), torch.tensor([0])
    loss = module(x, y)
    assert float(loss) == pytest.approx(math.log1p(math.exp(-2.0)), rel=1e-6)
    loss.backward()
    assert not module.weight.grad[1].any()
    module.filter_threshold = 0.9
    plain = math.log1p(math.exp(-2.0) + math.exp(-0.4))
    assert float(module(x, y)) == pytest.approx(plain, rel=1e-6)


def test_without_other_classes_left_the_loss_is_zero() -> None:
    module = InterclassFilterLoss(2, 2, filter_threshold=0.5)
    module.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.8, 0.6]])})
    x = torch.tensor([[2.0, 0.0]], requires_grad=True)
    loss = module(x, torch.tensor([0]))
    loss.backward()
    assert float(loss) == 0.0
    assert not x.grad.any()
    assert not module.weight.grad.any()


def _bent_loss(x: Tensor, w: Tensor, y: Tensor, **bend: Any) -> Tensor:
    """A loss whose other classes are bent beyond thresholds that differ."""

    def thresholds(cosine: Tensor, labels: Tensor) -> Bend:
        return Bend(torch.linspace(-0.4, 0.6, len(cosine), dtype=cosine.dtype), **bend)

    prior = torch.linspace(-1.0, 0.0, len(w), dtype=w.dtype)
    stats = logsumexp_stats(x, w, y, scale=SCALE, log_prior=prior, bend=thresholds)
    return reduce_losses(margin_losses(stats, angular_margin=0.2), stats.labels, reduction="sum")


BENDS: list[dict[str, float]] = [{"p1": 0.3, "p2": 1.0}, {"p0": -math.inf}, {}, {"p0": 0.1, "p1": -0.5, "p2": 0.7}]


@pytest.mark.parametrize("bend", BENDS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_every_backend_against_the_reference(backend: str, bend: dict[str, float]) -> None:
    given = problem(20, 300, 17)
    with ltloss.use_backend("reference"):
        expected = _outcome(given, bend)
    single = type(given)(given.features.float(), given.prototypes.float(), given.labels)
    with ltloss.use_backend(backend):  # type: ignore[arg-type]
        assert_same(_outcome(single, bend), expected, 2e-6)
    if backend == "torch":
        with ltloss.use_backend("torch"):
            assert_same(_outcome(given, bend), expected, 1e-12)


def _outcome(given: Any, bend: dict[str, float]) -> Outcome:
    leaves = given.leaves()
    loss = _bent_loss(*leaves, **bend)
    return Outcome(loss.detach(), *torch.autograd.grad(loss, leaves[:2]))


@pytest.mark.parametrize("bend", BENDS[::3], ids=str)
def test_the_gradient_is_the_derivative(bend: dict[str, float]) -> None:
    x, w, y = problem(6, 9, 4)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return _bent_loss(x, w, y, **bend)

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), w.requires_grad_()))


def test_wrong_arguments_are_told() -> None:
    cases: list[tuple[Any, tuple[str, ...]]] = [
        (lambda: CurricularFaceLoss(C, D, momentum=2.0), ("momentum", "2.0")),
        (lambda: InterclassFilterLoss(C, D, filter_threshold=0.0), ("filter_threshold", "0.0")),
        (
            lambda: CurricularFaceLoss(C, D, label_smoothing=0.1)(X, Y),
            ("label smoothing", "with_logit_sum=True"),
        ),
        (lambda: InterclassFilterLoss(C, D, normalize_features=False)(X, Y), ("normalize_features=False",)),
    ]
    for call, words in cases:
        with refused(*words):
            call()


def test_without_a_hard_class_it_is_arcface() -> None:
    """Every other class lies opposite."""
    weight = torch.cat([torch.ones(1, D), -torch.ones(C - 1, D)]).double()
    curricular = CurricularFaceLoss(C, D, scale=SCALE, margin=MARGIN).double()
    arcface = ArcFaceLoss(C, D, scale=SCALE, margin=MARGIN, beyond_pi="arcface").double()
    arcface.load_state_dict({"weight": weight})
    curricular.load_state_dict({"weight": weight, "mean_cosine": torch.tensor(0.5)})
    x, y = torch.ones(3, D).double() + 0.1 * X[:3], torch.zeros(3, dtype=torch.int64)
    assert float(curricular(x, y)) == pytest.approx(float(arcface(x, y)), rel=1e-12)
