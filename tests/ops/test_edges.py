"""Section 5: every edge is defined, on the chunked and on the dense implementation."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.refusals import refused
from torch import Tensor

import ltloss
from ltloss.class_balance import margins_from_counts
from ltloss.functional import (
    cosine_logsumexp,
    feature_norm_penalty,
    margin_cross_entropy,
    min_angle_regularizer,
    nearest_prototype,
    top_k,
)
from ltloss.testing import FAMILY, MODULES, Problem, long_tail_counts, outcome, problem

pytestmark = pytest.mark.usefixtures("backend")

LABELS = torch.tensor([0, 1, 2])


def with_row(tensor: Tensor, row: int, value: float | Tensor) -> Tensor:
    changed = tensor.clone()
    changed[row] = value
    return changed


def three(dtype: torch.dtype = torch.float32) -> Problem:
    return problem(3, 4, 5, dtype=dtype, ignored=False)._replace(labels=LABELS)


@pytest.mark.parametrize("name", FAMILY)
def test_zero_feature_is_direction_zero(name: str) -> None:
    given = three()
    given = given._replace(features=with_row(given.features, 1, 0.0))
    got = outcome(given, **FAMILY[name](4))
    assert bool(torch.isfinite(torch.cat([t.flatten() for t in got])).all())
    if name == "cosine_softmax":
        each = margin_cross_entropy(*given, reduction="none")
        assert float(each[1]) == pytest.approx(math.log(4.0), rel=1e-6)  # cos = 0 to all four classes
        assert not got.features[1].any()


@pytest.mark.parametrize("name", FAMILY)
def test_zero_prototype_is_direction_zero(name: str) -> None:
    given = three()
    given = given._replace(prototypes=with_row(given.prototypes, 1, 0.0))
    got = outcome(given, **FAMILY[name](4))
    assert bool(torch.isfinite(torch.cat([t.flatten() for t in got])).all())
    if name == "cosine_softmax":
        assert not got.prototypes[1].any()
        r, t = cosine_logsumexp(*given, scale=4.0)
        assert float(t[1]) == 0.0
        assert bool(torch.isfinite(r).all())


def test_everything_zero() -> None:
    got = outcome(Problem(torch.zeros(3, 5), torch.zeros(4, 5), LABELS), angular_margin=0.3)
    assert math.isfinite(got.loss)
    assert not got.features.any()
    assert not got.prototypes.any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", FAMILY)
def test_cosine_of_exactly_one(name: str, sign: float) -> None:
    """cos = ±1: finite loss and gradient."""
    prototypes = torch.eye(4, 5)
    given = Problem(sign * 3.0 * prototypes[LABELS], prototypes, LABELS)
    got = outcome(given, **FAMILY[name](4))
    assert bool(torch.isfinite(torch.cat([t.flatten() for t in got])).all())


def test_bound_of_the_slope_at_cosine_one() -> None:
    """The slope is clamped at 2048, and the gradient that reaches a vector is the slope times sin θ: tiny."""
    from ltloss.margins import arccos, margin_cosine

    for value in (1.0, -1.0, 1.0 + 1e-7, -1.0 - 1e-7):
        cosine = torch.tensor([value], requires_grad=True)
        for function in (arccos, lambda c: margin_cosine(c, angular_margin=1.0)):
            (slope,) = torch.autograd.grad(function(cosine).sum(), cosine)
            assert abs(float(slope)) <= 2049  # 2048 in exact arithmetic, sin(x) < x makes it 1e-7 more


def test_two_equal_prototypes() -> None:
    """Minimum angle 0, gradient finite."""
    prototypes = torch.eye(4, 5)
    prototypes[3] = 2.0 * prototypes[0]
    prototypes.requires_grad_()
    cosine, index = nearest_prototype(prototypes)
    assert cosine.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert index.tolist() == [3, 0, 0, 0]
    value = min_angle_regularizer(prototypes)
    assert float(value.detach()) == pytest.approx(-math.pi / 4, rel=1e-6)
    value.backward()
    assert bool(torch.isfinite(prototypes.grad).all())


def test_lowest_of_several_nearest_prototypes() -> None:
    prototypes = torch.eye(5)
    assert nearest_prototype(prototypes).index.tolist() == [1, 0, 0, 0, 0]
    assert nearest_prototype(prototypes, torch.tensor([3, 0])).index.tolist() == [0, 1]
    assert top_k(torch.ones(1, 5), prototypes, 3).index.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("name", FAMILY)
def test_single_class(name: str) -> None:
    """No other class: r = −∞, loss 0, gradient 0."""
    given = problem(3, 1, 5, dtype=torch.float32, ignored=False)
    options = FAMILY[name](1)
    got = outcome(given, **options)
    if not options.get("label_smoothing"):
        assert not got.loss.any()
        assert not got.features.any()
        assert not got.prototypes.any()
    else:  # (1−ε)(lse − z) + ε(lse − mean z) is 0 too, up to the rounding of logits of size 30
        assert float(got.loss.abs().max()) < 1e-5


def test_single_class_two_numbers_and_minimum_angle() -> None:
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(1, 5, requires_grad=True)
    r, t = cosine_logsumexp(x, w, torch.zeros(3, dtype=torch.int64), scale=4.0)
    assert r.tolist() == [-math.inf] * 3
    assert bool(torch.isfinite(t).all())
    cosine, index = nearest_prototype(w)
    assert (cosine.tolist(), index.tolist()) == ([-1.0], [-1])
    for rows in (None, torch.tensor([0, 0])):
        value = min_angle_regularizer(w, classes=rows)
        assert float(value.detach()) == 0.0
        (grad,) = torch.autograd.grad(value, w)
        assert not grad.any()


@pytest.mark.parametrize("name", FAMILY)
def test_empty_batch(name: str) -> None:
    """`mean` 0 with zero gradients, `none` an empty tensor."""
    given = problem(0, 4, 5, dtype=torch.float32)
    for reduction in ("mean", "sum", "none"):
        got = outcome(given, **FAMILY[name](4) | {"reduction": reduction})
        assert got.loss.shape == ((0,) if reduction == "none" else ())
        assert not got.loss.any()
        assert got.features.shape == (0, 5)
        assert got.prototypes.shape == (4, 5)
        assert not got.prototypes.any()


def test_empty_batch_elsewhere() -> None:
    x, w = torch.zeros(0, 5), torch.randn(4, 5)
    assert [t.shape for t in cosine_logsumexp(x, w, torch.zeros(0, dtype=torch.int64), scale=1.0)] == [(0,), (0,)]
    assert [t.shape for t in top_k(x, w, 2)] == [(0, 2), (0, 2)]
    assert float(feature_norm_penalty(x)) == 0.0
    none = torch.zeros(0, dtype=torch.int64)
    assert [t.shape for t in nearest_prototype(w, none)] == [(0,), (0,)]
    assert float(min_angle_regularizer(w, classes=none)) == 0.0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_neither_count_nor_poison(reduction: str) -> None:
    """No loss, no gradient, not counted in `mean`; padding may hold NaN."""
    given = three()
    kept = outcome(given, angular_margin=0.3, reduction=reduction)
    padded = Problem(
        torch.cat([torch.full((1, 5), math.nan), given.features, torch.full((1, 5), math.inf)]),
        given.prototypes,
        torch.tensor([7, 0, 1, 2, 7]),
    )
    weights = {"upstream": torch.tensor([9.0, -1.0, 0.5, 2.0, 9.0])} if reduction == "none" else {}
    got = outcome(padded, angular_margin=0.3, reduction=reduction, ignore_index=7, **weights)
    if reduction == "none":
        torch.testing.assert_close(got.loss[1:4], kept.loss)
        assert got.loss[[0, 4]].tolist() == [0.0, 0.0]
    else:
        torch.testing.assert_close(got.loss, kept.loss)
    assert not got.features[[0, 4]].any()
    torch.testing.assert_close(got.features[1:4], kept.features)
    torch.testing.assert_close(got.prototypes, kept.prototypes)


@pytest.mark.parametrize("name", MODULES)
def test_all_rows_ignored(name: str) -> None:
    module = MODULES[name](4, 5)
    for parameter in ("min_angle_weight", "feature_norm_weight"):  # L2 is about the prototypes, not about the batch
        if hasattr(module, parameter):
            setattr(module, parameter, 0.0)
    features = torch.randn(3, 5, requires_grad=True)
    loss = module(features, torch.full((3,), -100))
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert not features.grad.any()
    assert not module.weight.grad.any()


@pytest.mark.parametrize(("label", "position"), [(-1, 0), (4, 2), (10**6, 1), (-101, 2)])
def test_label_outside_is_an_index_error(label: int, position: int) -> None:
    """IndexError with the first bad label and where."""
    given = three()
    labels = with_row(LABELS, position, label)
    with refused("labels", "[0, 4)", str(label), str(position), error=IndexError):
        margin_cross_entropy(given.features, given.prototypes, labels)


@pytest.mark.parametrize("row", [-1, 4])
def test_row_outside_is_an_index_error(row: int) -> None:
    with refused("classes", "[0, 4)", str(row), "1", error=IndexError):
        nearest_prototype(torch.randn(4, 5), torch.tensor([0, row]))
    with refused("classes", "[0, 4)", str(row), "1", error=IndexError):
        min_angle_regularizer(torch.randn(4, 5), torch.ones(4), classes=torch.tensor([0, row]))


def test_class_without_samples() -> None:
    """n_c = 0: ValueError saying how many classes have no samples."""
    facts = ("2", "4", "1")  # 2 of 4 classes, the first is class 1
    counts = torch.tensor([3, 0, 2, 0])
    with refused(*facts):
        margins_from_counts(counts)
    for make in (ltloss.LDAMLoss, ltloss.LogitAdjustedLoss, ltloss.LongTailLoss):
        with refused(*facts):
            make.from_counts(counts, 5)
    with refused(*facts):
        min_angle_regularizer(torch.randn(4, 5), counts)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FAMILY)
def test_not_a_number_in_a_feature_stays_in_its_sample(name: str, value: float) -> None:
    """NaN or infinity in x: NaN in that sample's loss, and only in that one."""
    given = three()
    features = given.features.clone()
    features[1, 2] = value
    losses = margin_cross_entropy(features, given.prototypes, LABELS, **FAMILY[name](4) | {"reduction": "none"})
    assert torch.isnan(losses).tolist() == [False, True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 3])
def test_not_a_number_in_a_prototype_reaches_every_sample(row: int, value: float, tiny_blocks: object) -> None:
    given = three()
    prototypes = given.prototypes.clone()
    prototypes[row, 2] = value
    assert bool(torch.isnan(margin_cross_entropy(given.features, prototypes, LABELS, reduction="none")).all())


def test_gradient_of_a_poisoned_batch_is_not_a_number(tiny_blocks: object) -> None:
    """Never silently dropped on the way back either: an optimizer's NaN check must see it."""
    given = three()
    features = given.features.clone()
    features[1, 2] = math.nan
    got = outcome(given._replace(features=features))
    assert bool(torch.isnan(got.features[1]).all())
    assert bool(torch.isnan(got.prototypes).any())


def test_not_a_number_in_the_search() -> None:
    prototypes = with_row(torch.eye(4), 2, math.nan)
    cosine, _ = nearest_prototype(prototypes)
    assert bool(torch.isnan(cosine).all())
    assert bool(torch.isnan(min_angle_regularizer(prototypes)))
    assert bool(torch.isnan(top_k(torch.ones(1, 4), prototypes, 2).cosine).any())


def test_prior_of_minus_infinity_takes_a_class_out() -> None:
    given = three()
    prior = torch.tensor([0.0, 0.0, 0.0, -math.inf])
    got = outcome(given, log_prior=prior)
    without = outcome(given._replace(prototypes=given.prototypes[:3]))
    torch.testing.assert_close(got.loss, without.loss)
    torch.testing.assert_close(got.features, without.features)
    torch.testing.assert_close(got.prototypes[:3], without.prototypes)
    assert not got.prototypes[3].any()


def test_prior_of_minus_infinity_on_all_other_classes() -> None:
    given = three()
    alone = torch.tensor([-math.inf, 0.0, -math.inf, -math.inf])
    only = Problem(given.features[1:2], given.prototypes, LABELS[1:2])
    got = outcome(only, log_prior=alone)
    assert float(got.loss) == 0.0
    assert not got.features.any()
    assert not got.prototypes.any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_zero(reduction: str) -> None:
    given = three()
    some = outcome(given, class_weight=torch.tensor([1.0, 0.0, 2.0, 1.0]), reduction=reduction)
    assert not some.features[1].any()
    assert some.features[[0, 2]].any(1).all()
    none = outcome(given, class_weight=torch.zeros(4), reduction=reduction)
    assert not none.loss.any()
    assert not none.features.any()
    assert not none.prototypes.any()


def test_counts_are_not_changed() -> None:
    counts = long_tail_counts(4)
    kept = counts.clone()
    module = ltloss.LongTailLoss.from_counts(counts, 5)
    counts.zero_()
    assert torch.equal(module.class_counts, kept)
