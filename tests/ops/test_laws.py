"""The laws of the losses, at whatever sizes, losses and numbers hypothesis draws.

`make test` tries 200 cases of each law, always the same ones; `pytest --hypothesis-profile nightly` tries 2,000 others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import ltloss
from ltloss.testing import FAMILY, Outcome, Problem, assert_same, outcome, problem

MARGINS = ("angular_margin", "cosine_margin", "angle_multiplier", "beyond_pi", "margin_gradient")


class Case(NamedTuple):
    """A loss of the family on a random problem."""

    name: str
    given: Problem
    options: dict[str, Any]
    seed: int

    def outcome(self, options: dict[str, Any] | None = None, **changed: Tensor) -> Outcome:
        """Loss and gradients, with other options or another problem."""
        return outcome(self.given._replace(**changed), **(self.options if options is None else options))

    def random(self) -> torch.Generator:
        """Numbers of its own."""
        return torch.Generator().manual_seed(self.seed + 1)


@st.composite
def cases(draw: st.DrawFn, lengths_count: bool = True) -> Case:
    """N from 1 to 12, C from 2 to 14, D from 2 to 9; sometimes equal labels, parallel rows or an ignored sample."""
    names = [n for n, options in FAMILY.items() if lengths_count or options(2).get("normalize_prototypes", True)]
    name, seed = draw(st.sampled_from(names)), draw(st.integers(0, 1 << 20))
    n, c, d = draw(st.integers(1, 12)), draw(st.integers(2, 14)), draw(st.integers(2, 9))
    found = problem(n, c, d, ignored=draw(st.booleans()), seed=seed)
    if draw(st.booleans()):
        found = found._replace(labels=found.labels.clamp(max=draw(st.integers(0, c - 1))))
    if draw(st.booleans()):  # a feature that points where a prototype does
        features = found.features.clone()
        features[0] = 3.0 * found.prototypes[draw(st.integers(0, c - 1))] + 1e-3
        found = found._replace(features=features)
    return Case(name, found, FAMILY[name](c), seed)


pytestmark = pytest.mark.usefixtures("tiny_blocks")

EXACT = 1e-9  # float64, of sums of some products times a scale of 30; a slope near cos = 1 may be 10^4


@given(cases())
def test_the_backends_agree(case: Case) -> None:
    with ltloss.use_backend("reference"):
        expected = case.outcome()
    assert_same(case.outcome(), expected, EXACT)


@given(cases())
def test_samples_in_another_order(case: Case) -> None:
    order = torch.randperm(len(case.given.labels), generator=case.random())
    assume(case.options.get("reduction") != "none")
    got = case.outcome(features=case.given.features[order], labels=case.given.labels[order])
    assert_same(got._replace(features=got.features[order.argsort()]), case.outcome(), EXACT)


@given(cases())
def test_classes_in_another_order(case: Case) -> None:
    order = torch.randperm(len(case.given.prototypes), generator=case.random())
    labels = torch.where(case.given.labels < 0, case.given.labels, order.argsort()[case.given.labels.clamp_min(0)])
    options = {k: v[order] if isinstance(v, Tensor) and v.dim() else v for k, v in case.options.items()}
    got = case.outcome(options, prototypes=case.given.prototypes[order], labels=labels)
    assert_same(got._replace(prototypes=got.prototypes[order.argsort()]), case.outcome(), EXACT)


@given(cases())
def test_a_rotation(case: Case) -> None:
    width = case.given.features.shape[1]
    turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=case.random())).Q
    got = case.outcome(features=case.given.features @ turn, prototypes=case.given.prototypes @ turn)
    back = got._replace(features=got.features @ turn.t(), prototypes=got.prototypes @ turn.t())
    assert_same(back, case.outcome(), EXACT)


@given(cases(lengths_count=False))
def test_lengths_of_prototypes(case: Case) -> None:
    longer = torch.exp(2.0 * torch.randn(len(case.given.prototypes), 1, dtype=torch.float64, generator=case.random()))
    got = case.outcome(prototypes=case.given.prototypes * longer)
    assert_same(got._replace(prototypes=got.prototypes * longer), case.outcome(), EXACT)


@given(cases(), st.integers(0, 12))
def test_a_batch_in_two_parts(case: Case, first: int) -> None:
    options = {**case.options, "reduction": "sum"}
    whole = case.outcome(options)
    parts = [
        case.outcome(options, features=case.given.features[rows], labels=case.given.labels[rows])
        for rows in (slice(None, first), slice(first, None))
    ]
    together = Outcome(
        parts[0].loss + parts[1].loss,
        torch.cat([part.features for part in parts]),
        parts[0].prototypes + parts[1].prototypes,
    )
    assert_same(together, whole, EXACT)


@given(cases(), st.integers(0, 13))
def test_weight_zero_is_ignored(case: Case, number: int) -> None:
    classes = len(case.given.prototypes)
    left_out = number % classes
    weight = case.options.get("class_weight", torch.ones(classes)).double()
    without = torch.where(torch.arange(classes) == left_out, 0.0, weight)
    labels = torch.where(case.given.labels == left_out, -100, case.given.labels)
    expected = case.outcome({**case.options, "class_weight": weight}, labels=labels)
    assert_same(case.outcome({**case.options, "class_weight": without}), expected, EXACT)


@given(cases(lengths_count=False))
def test_margin_zero_is_cosine_softmax(case: Case) -> None:
    plain = {name: value for name, value in case.options.items() if name not in MARGINS}
    zero = torch.zeros(len(case.given.prototypes))
    for margins in ({"angular_margin": zero}, {"cosine_margin": zero, "angle_multiplier": 1.0, "angular_margin": 0.0}):
        assert_same(case.outcome({**plain, **margins}), case.outcome(plain), EXACT)


@given(cases())
def test_smoothing_zero_is_none(case: Case) -> None:
    plain = {name: value for name, value in case.options.items() if name != "label_smoothing"}
    expected = case.outcome(plain)
    assert_same(case.outcome({**plain, "label_smoothing": 0.0}), expected, EXACT)
    # Nothing jumps there: 1e-13 of a loss of some hundreds at most.
    assert_same(case.outcome({**plain, "label_smoothing": 1e-13}), expected, 1e-8, smallest_size=1.0)


@given(cases(), st.floats(-100, 100))
def test_a_constant_in_the_prior_cancels(case: Case, constant: float) -> None:
    prior = case.options.get("log_prior", torch.zeros(len(case.given.prototypes))).double()
    shifted = case.outcome({**case.options, "log_prior": prior + constant})
    assert_same(shifted, case.outcome({**case.options, "log_prior": prior}), EXACT)
