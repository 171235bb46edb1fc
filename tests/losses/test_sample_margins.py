"""Margins per sample: AdaFace, MagFace and ElasticFace by their papers' formulas, written out densely in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.refusals import refused
from torch import Tensor
from torch.nn import functional

from ltloss import AdaFaceLoss, ElasticFaceLoss, MagFaceLoss
from ltloss.extend import logsumexp_stats, margin_losses, reduce_losses
from ltloss.losses.sample_margins import _uniform
from ltloss.margins import margin_cosine
from ltloss.testing import problem, relative_error

C, D, SCALE = 9, 5, 6.0
X, _, Y = problem(12, C, D, ignored=False)
LENGTHS = X.norm(dim=1)


def _dense(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy (N,) where the target logit over s is ``target``."""
    cosine = functional.normalize(x) @ functional.normalize(weight).t()
    logits = SCALE * torch.where(torch.arange(C) == Y[:, None], target[:, None], cosine)
    return functional.cross_entropy(logits, Y, reduction="none")


def _angle(x: Tensor, weight: Tensor) -> Tensor:
    return (functional.normalize(x) * functional.normalize(weight[Y])).sum(1).acos()


def test_adaface_is_its_formula() -> None:
    module = AdaFaceLoss(C, D, scale=SCALE, margin=0.4, concentration=0.5, momentum=0.9).double()
    found = module(X, Y)
    mean, std = 20.0 * 0.9 + 0.1 * LENGTHS.mean(), 100.0 * 0.9 + 0.1 * LENGTHS.std()
    assert relative_error(module.length_moments, torch.stack([mean, std])) < 1e-6
    quality = (0.5 * (LENGTHS - mean) / (std + 1e-3)).clamp(-1, 1)
    phase = (_angle(X, module.weight) - 0.4 * quality).clamp(0, math.pi)
    expected = _dense(X, module.weight, phase.cos() - 0.4 - 0.4 * quality).mean()
    assert relative_error(found, expected) < 1e-7  # the moments are float32
    module.eval()
    before = module.length_moments.clone()
    module(X, Y)
    assert torch.equal(module.length_moments, before)
    module.reset_parameters()
    assert module.length_moments.tolist() == [20.0, 100.0]


def test_adaface_sends_no_gradient_through_the_length() -> None:
    module = AdaFaceLoss(C, D, scale=SCALE, concentration=2.0).double()
    x = X.clone().requires_grad_()
    module(x, Y).backward()
    # A feature enters by its direction alone, so its gradient is at right angles to it.
    assert float((x.grad * X).sum(1).abs().max()) < 1e-12 * float(x.grad.abs().max())


def test_magface_is_its_formula_and_its_gradient() -> None:
    low, high = 2.0, 4.0
    module = MagFaceLoss(
        C, D, scale=SCALE, min_length=low, max_length=high, min_margin=0.4, max_margin=0.9, penalty_weight=3.0
    ).double()
    assert 0 < int((low > LENGTHS).sum()) + int((high < LENGTHS).sum()) < len(LENGTHS)
    found_x, expected_x = X.clone().requires_grad_(), X.clone().requires_grad_()
    found = module(found_x, Y)
    length = expected_x.norm(dim=1).clamp(low, high)
    angle = _angle(expected_x, module.weight.detach())
    with_margin = (angle + 0.4 + 0.5 * (length - low) / (high - low)).cos()
    target = torch.where(angle < math.pi / 2, with_margin, angle.cos())
    losses = _dense(expected_x, module.weight.detach(), target) + 3.0 * (1 / length + length / high**2)
    assert relative_error(found, losses.mean()) < 1e-12
    found.backward()
    losses.mean().backward()
    assert relative_error(found_x.grad, expected_x.grad) < 1e-10


@pytest.mark.parametrize("kind", ["arc", "cos"])
def test_elasticface_draws_around_the_mean(kind: str) -> None:
    module = ElasticFaceLoss(C, D, scale=SCALE, kind=kind, mean=0.3, std=0.2, reduction="none").double()
    first, second = module(X, Y), module(X, Y)
    assert not torch.equal(first, second)
    module.step.fill_(1)
    assert torch.equal(module(X, Y), second), "the step decides what is drawn"
    module.eval()
    angle = _angle(X, module.weight)
    target = (angle + 0.3).cos() if kind == "arc" else angle.cos() - 0.3
    beyond = angle + 0.3 > math.pi
    target = torch.where(beyond, -2 - target, target) if kind == "arc" else target
    assert relative_error(module(X, Y), _dense(X, module.weight, target)) < 1e-12


def test_elasticface_gives_far_samples_the_large_margins() -> None:
    module = ElasticFaceLoss(C, D, sort=True, std=0.5)
    plain = ElasticFaceLoss(C, D, std=0.5)
    plain.load_state_dict(module.state_dict())
    x, y = torch.randn(300, D), torch.randint(C, (300,))
    y[5] = -100
    stats = logsumexp_stats(x, module.weight, y, scale=module.scale)
    drawn, unsorted = module._drawn(stats), plain._drawn(stats)
    counted = y >= 0
    assert torch.equal(drawn[counted].sort()[0], unsorted[counted].sort()[0])
    order = stats.target_logit[counted].argsort()
    assert bool((drawn[counted][order].diff() <= 0).all())
    assert float(drawn[5]) == 0.0


def test_what_is_drawn_is_normal() -> None:
    uniform = _uniform(torch.arange(1 << 18))
    histogram = torch.histc(uniform, 64, 0.0, 1.0)
    chi_squared = float(((histogram - 4096) ** 2 / 4096).sum())
    assert 63 - 4 * 126**0.5 < chi_squared < 63 + 4 * 126**0.5
    assert abs(float(torch.corrcoef(torch.stack([uniform[1:], uniform[:-1]]))[0, 1])) < 4 / 2**9
    module = ElasticFaceLoss(C, D)
    stats = logsumexp_stats(torch.randn(20_000, D), module.weight, torch.randint(C, (20_000,)), scale=1.0)
    drawn = module._drawn(stats)
    assert abs(float(drawn.mean())) < 4 / 20_000**0.5
    assert float(drawn.std()) == pytest.approx(1.0, abs=4 / 40_000**0.5)


def test_every_seed_of_64_bits_draws_its_own() -> None:
    module = ElasticFaceLoss(C, D)
    stats = logsumexp_stats(torch.randn(4, D), module.weight, torch.arange(4), scale=1.0)
    drawn = []
    for seed in (0, 1, -1, (1 << 23) - 1, -(1 << 23), 1 << 23, 1 << 24, 1 << 40, (1 << 63) - 1, -(1 << 63)):
        module.seed = seed
        drawn.append(tuple(module._drawn(stats).tolist()))
    assert len(set(drawn)) == len(drawn)
    normal = torch.special.ndtri(_uniform(torch.arange(4) - (1 << 40)))
    assert drawn[2] == pytest.approx(tuple(normal.tolist()), rel=1e-12), "a seed draws what it drew before"


@pytest.mark.parametrize("beyond_pi", ["monotone", "arcface", "cosine", "clip", "easy"])
def test_margins_can_be_learned(beyond_pi: str) -> None:
    """The gradient of both margins of each sample against finite differences, also beyond π."""
    cosine = torch.linspace(-0.95, 0.97, 11, dtype=torch.float64).requires_grad_()
    angular = torch.linspace(0.9, -0.3, 11, dtype=torch.float64).requires_grad_()
    subtracted = torch.linspace(0.1, 0.5, 11, dtype=torch.float64).requires_grad_()

    def value(cosine: Tensor, angular: Tensor, subtracted: Tensor) -> Tensor:
        return margin_cosine(
            cosine, angular_margin=angular, cosine_margin=subtracted, angle_multiplier=1.1, beyond_pi=beyond_pi
        )

    assert torch.autograd.gradcheck(value, (cosine, angular, subtracted))
    assert torch.autograd.gradgradcheck(value, (cosine, angular, subtracted))


def test_a_margin_per_sample_gets_its_gradient() -> None:
    margin = torch.full((12,), 0.2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(C, D, dtype=torch.float64)

    def loss(margin: Tensor) -> Tensor:
        stats = logsumexp_stats(X, weight, Y, scale=SCALE)
        return reduce_losses(margin_losses(stats, sample_angular_margin=margin), stats.labels)

    assert torch.autograd.gradcheck(loss, (margin,))


@pytest.mark.parametrize(
    ("build", "facts"),
    [
        (lambda: AdaFaceLoss(C, D, margin=-0.1), ("margin", "-0.1")),
        (lambda: AdaFaceLoss(C, D, momentum=1.5), ("momentum", "1.5")),
        (lambda: MagFaceLoss(C, D, min_length=4.0, max_length=2.0), ("max_length", "4.0", "2.0")),
        (lambda: MagFaceLoss(C, D, max_margin=40.0), ("max_margin", "40.0")),
        (lambda: ElasticFaceLoss(C, D, kind="sphere"), ("kind", "arc", "cos", "'sphere'")),  # type: ignore[arg-type]
        (lambda: ElasticFaceLoss(C, D, std=-1.0), ("std", "-1.0")),
    ],
)
def test_options_out_of_range(build: object, facts: tuple[str, ...]) -> None:
    with refused(*facts):
        build()  # type: ignore[operator]
