"""``torch.func`` over the losses: first derivatives as autograd has them, and words for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.refusals import refused
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import ltloss
from ltloss import functional as F
from ltloss import reference
from ltloss.margins import arccos
from ltloss.testing import FAMILY

N, C, D = 6, 5, 4
GENERATOR = torch.Generator().manual_seed(0)
X, W = (torch.randn(rows, D, generator=GENERATOR, dtype=torch.float64) for rows in (N, C))
LABELS = torch.tensor([0, 3, 3, -100, 4, 1])


def by_autograd(loss: Callable[..., Tensor], *given: Tensor) -> tuple[Tensor, ...]:
    leaves = [one.clone().requires_grad_() for one in given]
    return torch.autograd.grad(loss(*leaves).sum(), leaves)


@pytest.mark.parametrize("name", ["everything", "feature_length_smoothed", "sphereface", "per_sample"])
def test_gradients_are_those_of_the_dense_formula(name: str) -> None:
    options = FAMILY[name](C)
    options = {key: one.double() if isinstance(one, Tensor) else one for key, one in options.items()}

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return F.margin_cross_entropy(x, w, LABELS, **options)

    wanted = by_autograd(lambda x, w: reference.margin_cross_entropy(x, w, LABELS, **options), X, W)
    value, pull = vjp(loss, X, W)
    torch.testing.assert_close(pull(torch.ones_like(value)), wanted, rtol=1e-9, atol=1e-12)
    if value.dim() == 0:
        assert torch.equal(grad(loss)(X, W), pull(torch.ones_like(value))[0])


@pytest.mark.parametrize(
    "module",
    [
        ltloss.LongTailLoss.from_counts([50, 20, 8, 3, 2], D, min_angle_weight=0.3),
        ltloss.CosineSpaceLoss(C, D, margin=0.2).eval(),
        ltloss.AdaFaceLoss(C, D).eval(),
        ltloss.LongTailLoss.from_counts([50, 20, 8, 3, 2], D, min_angle_weight=0.3, sub_centers=3),
    ],
    ids=lambda module: f"{type(module).__name__} {module.sub_centers}",
)
def test_modules_take_their_parameters_from_outside(module: ltloss.PrototypeHead) -> None:
    module.double()

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        value: Tensor = functional_call(module, {"weight": weight}, (x, LABELS))
        return value

    weight = W if module.sub_centers == 1 else torch.stack([W, W.flip(0), 2 * W.roll(1, 1)], 1)
    found = grad(loss, argnums=(0, 1))(weight, X)
    with ltloss.use_backend("reference"):
        wanted = by_autograd(loss, weight, X)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # a product per row of the Jacobian
def test_the_jacobian_of_the_losses_of_samples() -> None:
    def losses(x: Tensor) -> Tensor:
        return F.margin_cross_entropy(x, W, LABELS, angular_margin=0.3, reduction="none")

    found = jacrev(losses)(X)
    assert found.shape == (N, N, D)
    alone = [by_autograd(lambda x, i=i: losses(x)[i], X)[0] for i in range(N)]  # type: ignore[misc]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-9, atol=1e-12)


def _loss(x: Tensor, w: Tensor = W) -> Tensor:
    return F.margin_cross_entropy(x, w, LABELS, angular_margin=0.3)


@pytest.mark.parametrize(
    "derivative",
    [
        lambda: grad(lambda x: grad(_loss)(x).sum())(X),
        lambda: grad(lambda w: grad(_loss)(X, w).pow(2).sum())(W),
        lambda: torch.autograd.grad(grad(_loss)(X, leaf := W.clone().requires_grad_()).sum(), leaf),
        lambda: jvp(_loss, (X,), (X,)),
        lambda: vmap(lambda w: _loss(X, w))(torch.stack([W, W])),
    ],
    ids=["twice", "mixed", "autograd around", "forward", "vmap"],
)
def test_what_would_need_more_is_refused_in_words(derivative: Callable[[], Any]) -> None:
    with refused("MarginCrossEntropy", "ltloss.use_backend('reference')", error=RuntimeError):
        derivative()


def test_the_reference_goes_through_every_transform() -> None:
    with ltloss.use_backend("reference"):
        found, several = hessian(_loss)(X), vmap(grad(_loss, argnums=1), (None, 0))(X, torch.stack([W, 2 * W]))
        wanted = torch.autograd.functional.hessian(_loss, X)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    one = by_autograd(lambda w: _loss(X, w), W)[0]
    torch.testing.assert_close(several, torch.stack([one, one / 2]), rtol=1e-9, atol=1e-12)


def test_gradients_of_each_sample() -> None:
    """Of the dense formula itself, which looks at no label."""
    kept = LABELS != -100

    def loss(w: Tensor, x: Tensor, label: Tensor) -> Tensor:
        return reference.margin_cross_entropy(x[None], w, label[None], angular_margin=0.3)

    found = vmap(grad(loss), (None, 0, 0))(W, X[kept], LABELS[kept])
    torch.testing.assert_close(found.mean(0), by_autograd(lambda w: _loss(X, w), W)[0], rtol=1e-9, atol=1e-12)


def test_the_angle_has_its_bounded_slope() -> None:
    cosine = torch.tensor([-1.0, -0.5, 0.0, 0.9, 1.0], dtype=torch.float64)
    wanted = [-2048.0, -1 / 0.75**0.5, -1.0, -1 / 0.19**0.5, -2048.0]
    found = vmap(grad(arccos))(cosine)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    assert torch.equal(found, by_autograd(arccos, cosine)[0])
