"""The laws of the losses, for both backends, at whatever sizes, losses and numbers hypothesis draws.

A law says what a change of the problem does to loss and gradients. Each side is held against the float64 reference of
the problem as it was, so a law is one call of the backend. PyTorch computes in float64, the kernels in float32.

`make test` tries 200 cases of each law in PyTorch and 12 on the kernels, of which Triton's interpreter runs 5 to 10 a
second; always the same ones. `pytest --hypothesis-profile nightly` tries 2,000 others of each, on either backend.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import profiles
from helpers.kernel_problems import DEVICE, tiny_tiles
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ltloss
from ltloss import reference
from ltloss.margins import ANGLE_FLOOR
from ltloss.testing import FAMILY, Outcome, Problem, assert_same, outcome, problem

EXACT = 1e-9  # float64, of sums of some products times a scale of 30
ROUNDINGS = 8.0
MARGINS = ("angular_margin", "cosine_margin", "angle_multiplier", "beyond_pi", "margin_gradient")


class Backend(NamedTuple):
    """What computes, in which dtype and where; the largest N, C and D, some tiles each; cases while one works."""

    name: str
    dtype: torch.dtype
    device: str
    sizes: tuple[int, int, int]
    cases: int


BACKENDS = [
    Backend("torch", torch.float64, "cpu", (12, 14, 9), 200),
    Backend("triton", torch.float32, DEVICE, (20, 40, 18), 12),
]


MARKED = [pytest.param(one, id=one.name, marks=[pytest.mark.slow] * (one.name == "triton")) for one in BACKENDS]


class Case(NamedTuple):
    """A loss of the family on a random problem, whose numbers the backend's dtype can hold."""

    name: str
    given: Problem
    options: dict[str, Any]
    number: int
    backend: Backend

    def outcome(self, options: dict[str, Any] | None = None, **changed: Tensor) -> Outcome:
        """Loss and gradients by the backend, with other options or another problem."""
        _, dtype, device, *_ = self.backend
        features, prototypes, labels = self.given._replace(**changed)
        options = self.options if options is None else options
        here = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in options.items()}
        got = outcome(Problem(features.to(device, dtype), prototypes.to(device, dtype), labels.to(device)), **here)
        return Outcome(*(part.double().cpu() for part in got))

    def exact(self, options: dict[str, Any] | None = None, **changed: Tensor) -> Outcome:
        """The same by the float64 reference."""
        options = self.options if options is None else options
        return outcome(self.given._replace(**changed), loss=reference.margin_cross_entropy, **options)

    def random(self) -> torch.Generator:
        """Numbers of its own."""
        return torch.Generator().manual_seed(self.number)

    def holds(self, got: Outcome, expected: Outcome, smallest_size: float = 0.0) -> None:
        """Assert that they differ by rounding only.

        A cosine has an error of some roundings, and a logit one of s times that; in float32 as much may a loss of size
        1 be off, and a gradient. An angle makes more of it, by 1/sin θ of the target, and its slope by 1/sin²θ, which
        are bounded. What a slope's error is relative to are the terms of a gradient, which may cancel each other.
        Nothing is known of a float32 slope there, where 1/sin²θ is 4 million.
        """
        steep, roundings = self.steepness(), ROUNDINGS * torch.finfo(self.backend.dtype).eps
        if self.backend.dtype == torch.float64:
            of_slope = roundings * steep**2
            size = max(smallest_size, self.largest_term() * of_slope / (EXACT + of_slope))
            return assert_same(got, expected, EXACT + of_slope, size)
        rows, prototypes, _ = self.given
        length = 1.0
        for matrix, normalized in ((rows, "normalize_features"), (prototypes, "normalize_prototypes")):
            if not self.options.get(normalized, True):
                length *= float(matrix.norm(dim=1).max())
        of_logits = self.options.get("scale", 30.0) * length * steep
        only_loss = expected._replace(loss=got.loss)  # which has no slope
        assert_same(only_loss, expected, roundings * (1.0 + of_logits), smallest_size=1.0)
        return assert_same(got, expected, roundings * (of_logits + steep**2), smallest_size=1.0)

    def largest_term(self) -> float:
        """What one logit adds to a gradient at most: s times a class weight over the length of a row."""
        lengths = torch.cat([matrix.norm(dim=1) for matrix in self.given[:2]])
        weight = self.options.get("class_weight", torch.ones(1))
        return self.options.get("scale", 30.0) * float(weight.max()) / float(lengths[lengths > 0].min())

    def steepness(self) -> float:
        """The largest 1/sin θ of a target with a margin on its angle, as far as that is bounded; else 1."""
        rows, prototypes, labels = self.given
        counted = labels >= 0
        if not self.options.keys() & {"angular_margin", "angle_multiplier"} or not bool(counted.any()):
            return 1.0
        cosine = torch.cosine_similarity(rows[counted], prototypes[labels[counted]])
        return 1.0 / max(ANGLE_FLOOR, float((1.0 - cosine**2).clamp_min(0.0).sqrt().min()))


@st.composite
def cases(draw: st.DrawFn, backend: Backend) -> Case:
    """N, C and D from 1, 2 and 2 on; sometimes equal labels, parallel rows or an ignored sample."""
    name, number = draw(st.sampled_from(list(FAMILY))), draw(st.integers(0, 1 << 20))
    n, c, d = (draw(st.integers(least, most)) for least, most in zip((1, 2, 2), backend.sizes, strict=True))
    found = problem(n, c, d, ignored=draw(st.booleans()), dtype=backend.dtype, seed=number)
    found = Problem(found.features.double(), found.prototypes.double(), found.labels)
    if draw(st.booleans()):
        found = found._replace(labels=found.labels.clamp(max=draw(st.integers(0, c - 1))))
    if draw(st.booleans()):  # a feature that points where a prototype does
        features = found.features.clone()
        near = 3.0 * found.prototypes[draw(st.integers(0, c - 1))] + 1e-3
        features[0] = near.to(backend.dtype).double()
        found = found._replace(features=features)
    return Case(name, found, FAMILY[name](c), number, backend)


def law(holds: Callable[[Case], None]) -> Callable[..., None]:
    """A test of a law, on every backend, of as many cases as it has time for; under another profile, of all."""

    @pytest.mark.parametrize("backend", MARKED)
    @pytest.mark.usefixtures("tiny_blocks")
    def test(backend: Backend) -> None:
        with ExitStack() as stack:
            if backend.name == "triton":
                pytest.importorskip("triton")
                stack.enter_context(tiny_tiles())
                stack.enter_context(np.errstate(all="ignore"))
            stack.enter_context(ltloss.use_backend(backend.name))
            few = settings(max_examples=profiles.cases(backend.cases))
            few(given(cases(backend))(holds))()

    return test


@law
def test_what_the_reference_gives(case: Case) -> None:
    case.holds(case.outcome(), case.exact())


@law
def test_samples_in_another_order(case: Case) -> None:
    order = torch.randperm(len(case.given.labels), generator=case.random())
    assume(case.options.get("reduction") != "none")
    got = case.outcome(features=case.given.features[order], labels=case.given.labels[order])
    case.holds(got._replace(features=got.features[order.argsort()]), case.exact())


@law
def test_classes_in_another_order(case: Case) -> None:
    order = torch.randperm(len(case.given.prototypes), generator=case.random())
    labels = torch.where(case.given.labels < 0, case.given.labels, order.argsort()[case.given.labels.clamp_min(0)])
    options = {k: v[order] if isinstance(v, Tensor) and v.dim() else v for k, v in case.options.items()}
    got = case.outcome(options, prototypes=case.given.prototypes[order], labels=labels)
    case.holds(got._replace(prototypes=got.prototypes[order.argsort()]), case.exact())


@law
def test_a_rotation(case: Case) -> None:
    width = case.given.features.shape[1]
    turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=case.random())).Q
    got = case.outcome(features=case.given.features @ turn, prototypes=case.given.prototypes @ turn)
    case.holds(got._replace(features=got.features @ turn.t(), prototypes=got.prototypes @ turn.t()), case.exact())


@law
def test_lengths_of_prototypes(case: Case) -> None:
    assume(case.options.get("normalize_prototypes", True))
    longer = torch.exp(2.0 * torch.randn(len(case.given.prototypes), 1, dtype=torch.float64, generator=case.random()))
    got = case.outcome(prototypes=case.given.prototypes * longer)
    case.holds(got._replace(prototypes=got.prototypes * longer), case.exact())


@law
def test_a_batch_in_two_parts(case: Case) -> None:
    options, first = {**case.options, "reduction": "sum"}, case.number % (len(case.given.labels) + 1)
    parts = [
        case.outcome(options, features=case.given.features[rows], labels=case.given.labels[rows])
        for rows in (slice(None, first), slice(first, None))
    ]
    together = Outcome(
        parts[0].loss + parts[1].loss,
        torch.cat([part.features for part in parts]),
        parts[0].prototypes + parts[1].prototypes,
    )
    case.holds(together, case.exact(options))


@law
def test_weight_zero_is_ignored(case: Case) -> None:
    classes = len(case.given.prototypes)
    left_out = case.number % classes
    weight = case.options.get("class_weight", torch.ones(classes)).double()
    without = torch.where(torch.arange(classes) == left_out, 0.0, weight)
    labels = torch.where(case.given.labels == left_out, -100, case.given.labels)
    expected = case.exact({**case.options, "class_weight": weight}, labels=labels)
    case.holds(case.outcome({**case.options, "class_weight": without}), expected)


@law
def test_margin_zero_is_cosine_softmax(case: Case) -> None:
    assume(case.options.get("normalize_prototypes", True))
    plain = {name: value for name, value in case.options.items() if name not in MARGINS}
    zero = torch.zeros(len(case.given.prototypes))
    margins = {"cosine_margin": zero, "angle_multiplier": 1.0, "angular_margin": 0.0}
    case.holds(case.outcome({**plain, **(margins if case.number % 2 else {"angular_margin": zero})}), case.exact(plain))


@law
def test_smoothing_zero_is_none(case: Case) -> None:
    plain = {name: value for name, value in case.options.items() if name != "label_smoothing"}
    # Nothing jumps there: 1e-15 of a loss of some hundreds at most.
    smoothing = 1e-15 if case.number % 2 else 0.0
    case.holds(case.outcome({**plain, "label_smoothing": smoothing}), case.exact(plain), smallest_size=1.0)


@law
def test_a_constant_in_the_prior_cancels(case: Case) -> None:
    prior = case.options.get("log_prior", torch.zeros(len(case.given.prototypes))).double()
    constant = case.number % 41 - 20.0
    shifted = case.outcome({**case.options, "log_prior": prior + constant})
    case.holds(shifted, case.exact({**case.options, "log_prior": prior}))
