"""The extension interface: values, gradients of any order, and what it refuses."""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any

import pytest
import torch
from helpers.refusals import refused, warned
from torch import Tensor
from torch.nn import functional as F

import ltloss
from ltloss import functional, reference
from ltloss.extend import (
    LogSumExpStats,
    focal_losses,
    logsumexp_stats,
    margin_losses,
    poly1_losses,
    reduce_losses,
)
from ltloss.runtime import Backend
from ltloss.testing import FAMILY, NOT_A_DERIVATIVE, problem, relative_error

EXACT = 1e-10


def _loss(features: Tensor, prototypes: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The family again, out of the three steps."""
    scale = options.pop("scale", 30.0)
    names = ("log_prior", "normalize_features", "normalize_prototypes", "ignore_index")
    wide = {name: options.pop(name) for name in names if name in options}
    ends = {name: options.pop(name) for name in ("class_weight", "reduction") if name in options}
    smooth = options.get("label_smoothing", 0.0) > 0.0
    stats = logsumexp_stats(features, prototypes, labels, scale=scale, with_logit_sum=smooth, **wide)
    return reduce_losses(margin_losses(stats, **options), stats.labels, **ends)


@pytest.mark.parametrize("name", FAMILY)
def test_three_steps_are_the_one_function(name: str, backend: str) -> None:
    given = problem().leaves()
    ours, law = _loss(*given, **FAMILY[name](9)), functional.margin_cross_entropy(*given, **FAMILY[name](9))
    assert relative_error(ours, law) <= EXACT
    upstream = torch.linspace(-1.0, 2.0, ours.numel(), dtype=ours.dtype).view(ours.shape)
    for one, other in zip(*(torch.autograd.grad((v * upstream).sum(), given[:2]) for v in (ours, law)), strict=True):
        assert relative_error(one, other) <= EXACT


@pytest.mark.parametrize("build", [functional.margin_cross_entropy, _loss], ids=["function", "extension"])
@pytest.mark.parametrize("name", [name for name in FAMILY if name not in NOT_A_DERIVATIVE])
def test_the_reference_is_differentiable_twice(name: str, build: Any) -> None:
    """A gradient penalty needs it. Samples whose target is no class have no gradient, and NaN nowhere."""
    features, prototypes, labels = problem(4, 5, 3).leaves()
    options = FAMILY[name](5)
    with ltloss.use_backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda x, w: build(x, w, labels, **options), (features, prototypes), atol=1e-4, rtol=1e-3
        )


def test_two_calls_of_grad_are_the_second_derivative() -> None:
    x = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)

    def margin(cosine: Tensor) -> Tensor:
        from ltloss.margins import margin_cosine

        return margin_cosine(cosine, angular_margin=0.4)

    assert torch.autograd.gradgradcheck(margin, (x,))


def test_a_scale_per_sample_gets_its_gradient() -> None:
    features, prototypes, labels = problem(ignored=False).leaves()
    scale = torch.linspace(3.0, 9.0, 7, dtype=torch.float64, requires_grad=True)

    def loss(scale: Tensor) -> Tensor:
        stats = logsumexp_stats(features, prototypes, labels, scale=scale)
        return margin_losses(stats, cosine_margin=0.1).sum()

    assert torch.autograd.gradcheck(loss, (scale,))
    single = loss(torch.full((7,), 5.0, dtype=torch.float64))
    law = functional.margin_cross_entropy(features, prototypes, labels, scale=5.0, cosine_margin=0.1, reduction="sum")
    assert relative_error(single, law) <= EXACT


def test_a_learned_scale_gets_the_gradient_of_the_logits(backend: str) -> None:
    """∂L/∂s = Σ_i Σ_c G_ic·cos_ic, here of the logits of a linear classifier that has the same cosines."""
    features, prototypes, labels = problem(ignored=True)
    scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    stats = logsumexp_stats(features, prototypes, labels, scale=scale)
    loss = reduce_losses(margin_losses(stats), stats.labels)
    (ours,) = torch.autograd.grad(loss, scale)
    cosine = F.normalize(features) @ F.normalize(prototypes).t()
    logits = (6.0 * cosine).requires_grad_()
    law = F.cross_entropy(logits, labels)
    (of_logits,) = torch.autograd.grad(law, logits)
    assert relative_error(loss, law) <= EXACT
    assert relative_error(ours, (of_logits * cosine).sum()) <= EXACT


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("part", ["the sum of the other logits", "the target logit of a later label"])
def test_the_gradient_of_one_number_alone(part: str, backend: Backend) -> None:
    """The coefficients that are 0 then say nothing about the others."""
    given = problem(ignored=False)
    several = torch.stack([given.labels, (given.labels + 2) % 9], 1)

    def gradients(chosen: Backend, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = given.features.to(dtype).requires_grad_(), given.prototypes.to(dtype).requires_grad_()
        with ltloss.use_backend(chosen):
            if part == "the sum of the other logits":
                stats = logsumexp_stats(*leaves, given.labels, scale=8.0, with_logit_sum=True)
                assert stats.logit_sum is not None
                return torch.autograd.grad((stats.logit_sum - stats.target_logit).sum(), leaves)
            stats = logsumexp_stats(*leaves, several, scale=8.0)
            return torch.autograd.grad(stats.target_logit[:, 1].sum(), leaves)

    exact = gradients("reference", torch.float64)
    for one, other in zip(gradients(backend, torch.float32), exact, strict=True):
        assert relative_error(one, other) <= 5e-6


def test_where_a_learned_scale_goes_is_said() -> None:
    given, scale = problem(), torch.tensor(3.0, requires_grad=True)
    for call in (
        lambda: functional.margin_cross_entropy(*given, scale=scale),
        lambda: functional.cosine_logsumexp(*given, scale=scale),  # type: ignore[arg-type]
        lambda: ltloss.ArcFaceLoss(9, 5, scale=torch.nn.Parameter(scale)),
    ):
        with refused("scale", "ltloss.extend.logsumexp_stats", error=TypeError):
            call()


def test_margins_and_weights_per_sample() -> None:
    features, prototypes, labels = problem(9, 9, 5)  # N = C: the two kinds of vector are told apart by name
    margins, weights = torch.linspace(0.0, 0.5, 9).double(), torch.linspace(1.0, 2.0, 9).double()
    stats = logsumexp_stats(features, prototypes, labels, scale=8.0)
    per_sample = margin_losses(stats, sample_angular_margin=margins)
    for index in range(9):
        alone = reference.margin_cross_entropy(
            features, prototypes, labels, scale=8.0, angular_margin=float(margins[index]), reduction="none"
        )
        assert relative_error(per_sample[index], alone[index]) <= EXACT
    counted = labels >= 0
    mean = reduce_losses(per_sample, stats.labels, sample_weight=weights)
    expected = (per_sample * weights)[counted].sum() / weights[counted].sum()
    assert relative_error(mean, expected) <= EXACT


def _stats(**options: Any) -> LogSumExpStats:
    return logsumexp_stats(*problem(), **{"scale": 8.0, **options})


@pytest.mark.parametrize(
    ("call", "fact"),
    [
        (lambda: margin_losses(_stats(), angular_margin=torch.ones(7)), "angular_margin"),
        (lambda: margin_losses(_stats(), sample_cosine_margin=torch.ones(9)), "sample_cosine_margin"),
        (lambda: margin_losses(_stats(), label_smoothing=0.1), "with_logit_sum"),
        (lambda: margin_losses(_stats(), beyond_pi="up"), "beyond_pi"),  # type: ignore[arg-type]
        (lambda: _stats(scale=torch.ones(1, requires_grad=True)), "scale"),
        (lambda: _stats(scale=torch.tensor(3.0, requires_grad=True), normalize_features=False), "scale"),
        (lambda: _stats(scale=torch.ones(7), normalize_features=False), "scale"),
        (lambda: _stats(scale=-1.0), "scale"),
        (lambda: reduce_losses(torch.ones(3), torch.zeros(3).long(), sample_weight=torch.ones(2)), "sample_weight"),
    ],
)
def test_what_is_refused(call: Any, fact: str) -> None:
    with refused(fact):
        call()


def test_an_integer_margin_is_a_number() -> None:
    assert torch.equal(margin_losses(_stats(), cosine_margin=1), margin_losses(_stats(), cosine_margin=1.0))


class TestTheInterfaceOfVersion01:
    """``ltloss.epilogue`` has all that it exported, and each name says which one is new."""

    @pytest.fixture
    def epilogue(self) -> Any:
        sys.modules.pop("ltloss.epilogue", None)  # it warns when it is imported
        with warned("ltloss.epilogue", "ltloss.extend"):
            return importlib.import_module("ltloss.epilogue")

    def test_three_steps(self, epilogue: Any) -> None:
        given, weight = problem(), torch.linspace(0.5, 1.5, 9, dtype=torch.float64)
        with warned("one_pass", "ltloss.extend.logsumexp_stats"):
            result = epilogue.one_pass(*given, scale=9.0)
        with warned("margin_losses", "ltloss.extend.margin_losses"):
            losses = epilogue.margin_losses(result, cosine_margin=0.2)
        with warned("result", "stats"):
            assert torch.equal(epilogue.margin_losses(result=result, cosine_margin=0.2), losses)
        with warned("reduce_losses", "ltloss.extend.reduce_losses"):
            loss = epilogue.reduce_losses(losses, result.labels, weight, "mean")
        expected = functional.margin_cross_entropy(*given, scale=9.0, cosine_margin=0.2, class_weight=weight)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)
        with warned("fused_margin_cross_entropy", "ltloss.functional.margin_cross_entropy"):
            fused = epilogue.fused_margin_cross_entropy(*given, scale=9.0, cosine_margin=0.2, class_weight=weight)
        assert torch.equal(fused, expected)

    def test_the_fields_of_the_result(self, epilogue: Any) -> None:
        result = epilogue.one_pass(*problem(), scale=9.0, log_prior=torch.linspace(-2.0, -1.0, 9, dtype=torch.float64))
        assert isinstance(result, epilogue.OnePass)
        former = {"other_logsumexp": "logsumexp", "own_logit": "target_logit", "own_prior": "target_prior"}
        for name, now in former.items():
            with warned(f"OnePass.{name}", now):
                assert getattr(result, name) is getattr(result, now)
        values = {**result._asdict(), "own_logit": result.target_logit}
        del values["target_logit"]
        with warned("own_logit", "target_logit"):
            assert epilogue.OnePass(**values) == result

    def test_the_parts_of_a_pass(self, epilogue: Any) -> None:
        features, prototypes, labels = problem(ignored=False)
        prior = torch.linspace(-2.0, -1.0, 9, dtype=torch.float64)
        stats = logsumexp_stats(features, prototypes, labels, scale=9.0, log_prior=prior, with_logit_sum=True)
        with warned("wide_pass", "ltloss.extend.logsumexp_stats"):
            found = epilogue.wide_pass(features, prototypes, labels, prior, 9.0, True, True)
        expected = stats.logsumexp, stats.target_logit, stats.logit_sum - prior.sum()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        with warned("gather_per_class"):
            assert epilogue.gather_per_class(prior, torch.tensor([0, -1, 8])).tolist() == [-2.0, -2.0, -1.0]
        with warned("gather_per_class"):
            assert epilogue.gather_per_class(0.5, labels) == 0.5


class TestBentLosses:
    """Focal loss and Poly-1, by hand with ``math``."""

    LOSSES = (1e-9, 0.1, 1.0, 30.0, 400.0)

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
    def test_focal(self, gamma: float) -> None:
        losses = torch.tensor(self.LOSSES, dtype=torch.float64, requires_grad=True)
        expected = [(-math.expm1(-loss)) ** gamma * loss for loss in self.LOSSES]
        assert focal_losses(losses, gamma).tolist() == pytest.approx(expected, rel=1e-14)
        assert torch.autograd.gradcheck(lambda x: focal_losses(x, gamma), (losses[1:].detach().requires_grad_(),))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("gamma", "slope"), [(0.0, 1.0), (0.01, 0.0), (0.5, 0.0), (1.0, 0.0), (2.0, 0.0)])
    def test_the_slope_of_focal_where_nothing_is_wrong(self, gamma: float, slope: float, dtype: torch.dtype) -> None:
        """At ℓ = 0, at the smallest number there is, and on both sides of where the formula changes."""
        end = torch.finfo(dtype).eps
        given = [0.0, torch.finfo(dtype).smallest_normal / 8, 0.999 * end, 1.001 * end]
        losses = torch.tensor(given, dtype=dtype, requires_grad=True)
        value = focal_losses(losses, gamma)
        (grad,) = torch.autograd.grad(value.sum(), losses)
        assert (value.tolist()[0], grad.tolist()[0]) == (0.0, slope)
        assert grad.tolist() == pytest.approx([(1 + gamma) * loss**gamma for loss in given], rel=1e-5)
        assert value.tolist() == pytest.approx([loss ** (1 + gamma) for loss in given], rel=1e-5)

    @pytest.mark.parametrize("epsilon", [-1.0, 0.0, 2.5])
    def test_poly1(self, epsilon: float) -> None:
        losses = torch.tensor((0.0, *self.LOSSES), dtype=torch.float64, requires_grad=True)
        expected = [0.0, *(loss - epsilon * math.expm1(-loss) for loss in self.LOSSES)]
        assert poly1_losses(losses, epsilon).tolist() == pytest.approx(expected, rel=1e-14)
        assert torch.autograd.gradcheck(lambda x: poly1_losses(x, epsilon), (losses,))

    def test_in_the_place_of_the_loss(self, backend: str) -> None:
        """Focal CosFace: (1 − p)^γ·(−log p), with p of a softmax."""
        features, prototypes, labels = problem(ignored=False)
        stats = logsumexp_stats(features, prototypes, labels, scale=6.0)
        ours = reduce_losses(focal_losses(margin_losses(stats, cosine_margin=0.2), 1.5), stats.labels)
        cosine = F.normalize(features) @ F.normalize(prototypes).t()
        p = (6.0 * (cosine - 0.2 * F.one_hot(labels, 9).double())).softmax(1).gather(1, labels[:, None])
        assert relative_error(ours, (-((1 - p) ** 1.5) * p.log()).mean()) <= EXACT

    def test_what_is_refused(self) -> None:
        with refused("gamma", "-1.0"):
            focal_losses(torch.ones(2), -1.0)
        with refused("epsilon", "-1.5"):
            poly1_losses(torch.ones(2), -1.5)
