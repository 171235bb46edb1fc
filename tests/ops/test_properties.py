"""Invariants that hold whatever the numbers are, over the one list of losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ltloss.functional import cosine_logsumexp, margin_cross_entropy, nearest_prototype, top_k
from ltloss.testing import FAMILY, assert_same, outcome, problem, relative_error

# float64: sums of some ten products times a scale of 30.
EXACT = 1e-12

# Only one continuation beyond π falls everywhere, and smoothing also asks for a small logit of the target class.
MONOTONE = [
    name
    for name, options in FAMILY.items()
    if options(2).get("beyond_pi", "monotone") == "monotone" and not options(2).get("label_smoothing")
]

COSINES = [name for name, options in FAMILY.items() if options(2).get("normalize_prototypes", True)]

pytestmark = pytest.mark.usefixtures("tiny_blocks")


def per_class(options: dict[str, object], order: Tensor) -> dict[str, object]:
    return {k: v[order] if isinstance(v, Tensor) and v.dim() else v for k, v in options.items()}


@pytest.mark.parametrize("name", FAMILY)
def test_rotation_changes_nothing(name: str) -> None:
    given, options = problem(), FAMILY[name](9)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    plain = outcome(given, **options)
    turned = outcome(
        given._replace(features=given.features @ rotation, prototypes=given.prototypes @ rotation), **options
    )
    back = turned._replace(features=turned.features @ rotation.t(), prototypes=turned.prototypes @ rotation.t())
    assert_same(back, plain, EXACT)


@pytest.mark.parametrize("name", COSINES)
def test_only_directions_count(name: str) -> None:
    given, options = problem(), FAMILY[name](9)
    plain = outcome(given, **options)
    lengths = torch.logspace(-3, 3, 9, dtype=torch.float64)[:, None]
    got = outcome(given._replace(prototypes=given.prototypes * lengths), **options)
    assert_same(got._replace(prototypes=got.prototypes * lengths), plain, EXACT)
    lengths = torch.logspace(3, -3, 7, dtype=torch.float64)[:, None]
    got = outcome(given._replace(features=given.features * lengths), **options)
    if options.get("normalize_features", True):
        assert_same(got._replace(features=got.features * lengths), plain, EXACT)
    else:
        assert relative_error(got.loss, plain.loss) > 1e-3


@pytest.mark.parametrize("name", FAMILY)
def test_order_of_classes_and_samples_does_not_matter(name: str) -> None:
    given, options = problem(), FAMILY[name](9)
    plain = outcome(given, torch.ones(()), **options)
    order, samples = torch.randperm(9), torch.randperm(7)
    labels = torch.where(given.labels < 0, given.labels, order.argsort()[given.labels.clamp_min(0)])
    got = outcome(
        given._replace(features=given.features[samples], prototypes=given.prototypes[order], labels=labels[samples]),
        torch.ones(()),
        **per_class(options, order),
    )
    loss = got.loss[samples.argsort()] if got.loss.dim() else got.loss
    back = got._replace(loss=loss, features=got.features[samples.argsort()], prototypes=got.prototypes[order.argsort()])
    assert_same(back, plain, EXACT)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("constant", [3.0, -200.0])
def test_constant_in_the_prior_cancels(name: str, constant: float) -> None:
    given, options = problem(), FAMILY[name](9)
    prior = options.pop("log_prior", torch.zeros(9)).double()
    shifted = outcome(given, **options, log_prior=prior + constant)
    assert_same(shifted, outcome(given, **options, log_prior=prior), 1e-11)  # exponents of size 200: ten more roundings


@pytest.mark.parametrize("name", MONOTONE)
@pytest.mark.parametrize(("margin", "most"), [("angular_margin", 3.0), ("cosine_margin", 2.0)])
def test_a_margin_never_lowers_the_loss(name: str, margin: str, most: float) -> None:
    options = FAMILY[name](9) | {"reduction": "none"}
    given = problem(200)
    without = margin_cross_entropy(*given, **options | {margin: 0.0})
    previous = without
    for value in (0.1, 0.5, 1.0, 1.5, most):
        larger = margin_cross_entropy(*given, **options | {margin: value})
        assert bool((larger >= previous).all())
        previous = larger
    assert bool((previous > without)[given.labels >= 0].all())


@pytest.mark.parametrize("shards", [[9], [4, 5], [1, 3, 5], [1] * 9])
@pytest.mark.parametrize("with_prior", [False, True])
def test_shards_of_the_classes_combine_to_the_whole(shards: list[int], with_prior: bool) -> None:
    """Labels outside mean "no target class here": r combines by logaddexp and t by a sum, and so do the gradients."""
    given = problem(ignored=False)
    prior = torch.linspace(-2, 1, 9, dtype=torch.float64) if with_prior else None

    def gradients(r: Tensor, t: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(torch.nn.functional.softplus(r - t).sum(), leaves)

    leaves = given.leaves()
    r, t = cosine_logsumexp(*leaves, scale=9.0, log_prior=prior)
    whole = (r, t, *gradients(r, t, leaves[:2]))
    leaves = given.leaves()
    r, t = torch.full((7,), -math.inf, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    start = 0
    for size in shards:
        piece = slice(start, start + size)
        part_r, part_t = cosine_logsumexp(
            leaves.features,
            leaves.prototypes[piece],
            given.labels - start,
            scale=9.0,
            log_prior=None if prior is None else prior[piece],
        )
        r, t, start = torch.logaddexp(r, part_r), t + part_t, start + size
    for ours, exact in zip((r, t, *gradients(r, t, leaves[:2])), whole, strict=True):
        assert relative_error(ours, exact) <= EXACT


@pytest.mark.parametrize("name", COSINES)
def test_gradients_are_perpendicular(name: str) -> None:
    """Moving along a normalised vector changes nothing, per sample."""
    given, options = problem(), FAMILY[name](9)
    for sample in range(0, 7, 3):
        one = given._replace(features=given.features[sample : sample + 1], labels=given.labels[sample : sample + 1])
        got = outcome(one, **options)
        size = options.get("scale", 30.0) * 1e-14  # the rounding of terms of size s
        assert float((got.prototypes * given.prototypes).sum(1).abs().max()) <= size
        if options.get("normalize_features", True):
            assert float((got.features * one.features).sum(1).abs().max()) <= size


@pytest.mark.parametrize("name", FAMILY)
def test_descent_lowers_the_loss(name: str) -> None:
    given, options = problem(50), FAMILY[name](9)
    got = outcome(given, torch.ones(()), **options)
    step = 1e-4
    moved = given._replace(
        features=given.features - step * got.features, prototypes=given.prototypes - step * got.prototypes
    )
    after = margin_cross_entropy(*moved, **options).sum()
    expected = step * float(got.features.square().sum() + got.prototypes.square().sum())
    lowered = float(got.loss.sum() - after)
    if options.get("margin_gradient") == "straight_through":
        assert lowered > 0
    else:  # first order: the rest is of second order in a step of 1e-4
        assert lowered == pytest.approx(expected, rel=0.05)


def test_search_does_not_see_lengths_or_rotations() -> None:
    features, prototypes, _ = problem()
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    turned = (features * 3.0) @ rotation, (prototypes * 0.2) @ rotation
    assert torch.equal(top_k(features, prototypes, 4).index, top_k(*turned, 4).index)
    assert torch.equal(nearest_prototype(prototypes).index, nearest_prototype(turned[1]).index)


def test_nearest_is_symmetric_where_mutual() -> None:
    cosine, index = nearest_prototype(problem(1, 40, 3).prototypes)
    mutual = index[index] == torch.arange(40)
    assert bool(mutual.any())
    assert torch.equal(cosine[mutual], cosine[index[mutual]])
    assert bool((cosine[index] >= cosine - 1e-15).all())  # the partner has an equally near one at least
