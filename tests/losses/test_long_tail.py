"""The long-tail loss: its three terms, its forms, its prior."""

from __future__ import annotations

import pytest
import torch
from helpers.refusals import refused, warned
from torch import Tensor

import ltloss
from ltloss import functional
from ltloss.class_balance import log_prior_from_counts, margins_from_counts
from ltloss.testing import MODULES, long_tail_counts, outcome, problem

C, D = 9, 5


def batch() -> tuple[Tensor, Tensor]:
    features, _, labels = problem(7, C, D, dtype=torch.float32)
    return features, labels


@pytest.mark.parametrize("rows", ["all", "batch"])
def test_long_tail_loss_adds_its_regularisers(rows: str, backend: str) -> None:
    counts = long_tail_counts(C)
    module = ltloss.LongTailLoss.from_counts(
        counts, D, min_angle_weight=0.3, feature_norm_weight=0.2, feature_norm="ring", feature_norm_radius=2.0,
        min_angle_classes=rows, min_angle_power=0.5, margin_normalize="max", tau=0.0, scale=30.0,
    )  # fmt: skip
    features, labels = batch()
    counted = labels >= 0
    l1 = functional.margin_cross_entropy(
        features, module.weight, labels, angular_margin=margins_from_counts(counts, 0.5, normalize="max")
    )
    chosen = None if rows == "all" else labels[counted].unique()
    l2 = functional.min_angle_regularizer(module.weight, counts, count_exponent=0.5, classes=chosen)
    l3 = functional.feature_norm_penalty(features[counted], "ring", radius=2.0)
    torch.testing.assert_close(module(features, labels), l1 + 0.3 * l2 + 0.2 * l3)
    expected = {"margin_cross_entropy": l1, "min_angle": l2, "feature_norm": l3}
    torch.testing.assert_close(module.terms, {name: value.detach() for name, value in expected.items()})
    assert not any(part.requires_grad for part in module.terms.values())


def test_angles_of_a_batch_without_a_class_that_counts() -> None:
    module = ltloss.LongTailLoss.from_counts([5, 1], D, min_angle_classes="batch", min_angle_weight=0.5)
    module(torch.randn(2, D), torch.tensor([-100, -100])).backward()
    assert float(module.terms["min_angle"]) == 0.0
    assert module.weight.grad is not None
    assert not module.weight.grad.any()


def test_angles_leave_out_later_labels_of_a_sample_that_does_not_count() -> None:
    module = ltloss.LongTailLoss.from_counts([5, 4, 3, 2, 1], D, min_angle_classes="batch")
    features, labels, weight = torch.randn(2, D), torch.tensor([[0, 1], [-100, 3]]), torch.full((2, 2), 0.5)
    angles = []
    for rows in (slice(2), slice(1)):
        module(features[rows], labels[rows], label_weight=weight[rows])
        angles.append(module.terms["min_angle"])
    torch.testing.assert_close(*angles)


def test_angles_of_the_only_class() -> None:
    module = ltloss.LongTailLoss.from_counts([5], D, min_angle_classes="batch", min_angle_weight=0.5)
    module(torch.randn(2, D), torch.tensor([0, 0])).backward()
    assert float(module.terms["min_angle"]) == 0.0
    assert bool(module.weight.grad.isfinite().all())


def test_parts_hold_only_what_was_computed() -> None:
    module = MODULES["LongTailLoss with prior"](2, D)
    assert module.terms == {}
    module(torch.randn(2, D), torch.tensor([0, 1]))
    assert list(module.terms) == ["margin_cross_entropy"]


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_long_tail_loss_has_all_three_terms_and_tau_adds_the_prior_alone(tau: float, backend: str) -> None:
    counts = long_tail_counts(C)
    module = ltloss.LongTailLoss.from_counts(counts, D, **({"tau": tau} if tau else {}))
    features, labels = batch()
    l1 = functional.margin_cross_entropy(
        features, module.weight, labels, scale=ltloss.default_scale(C), angular_margin=0.5 * counts.float() ** -0.25,
        log_prior=log_prior_from_counts(counts) if tau else None,
    )  # fmt: skip
    l2 = functional.min_angle_regularizer(module.weight, counts, count_exponent=0.25)
    l3 = functional.feature_norm_penalty(features[labels >= 0], "ring", radius=1.25 * D**0.5)
    torch.testing.assert_close(module(features, labels), l1 + 0.1 * l2 + 0.1 * l3)
    assert sorted(module.terms) == ["feature_norm", "margin_cross_entropy", "min_angle"]
    assert (module.log_prior is None) == (tau == 0.0)


@pytest.mark.parametrize(
    ("form", "values"),
    [
        ("published", {}),
        ("recommended", {"tau": 1, "margin_normalize": "max", "min_angle_weight": 0, "feature_norm_weight": 0}),
    ],
)
def test_a_form_still_works_and_names_what_replaces_it(form: str, values: dict[str, object]) -> None:
    for given in ({}, {"margin": 0.3, "tau": 0.0, "min_angle_weight": 0.2}, {"normalize_features": False}):
        with warned(f"form='{form}'", *(["margin_normalize='max'"] if values else [])) as caught:
            old = ltloss.LongTailLoss.from_counts([9, 3, 1], D, form=form, **given)
        assert caught[0].filename == __file__
        # Short features may vanish without L3, so 0.1's recommended form kept it where features keep their length.
        kept = {"feature_norm_weight": 0.1} if "normalize_features" in given else {}
        new = ltloss.LongTailLoss.from_counts([9, 3, 1], D, **{**values, **kept, **given})
        assert repr(old) == repr(new)
        assert torch.equal(old.angular_margin, new.angular_margin)
    with warned(f"form='{form}'"):
        given_prior = ltloss.LongTailLoss.from_counts([9, 3, 1], D, form=form, log_prior=torch.zeros(3))
    assert given_prior.tau == 0.0


def test_an_unknown_form_is_refused() -> None:
    with refused("form", "published", "recommended", "'best'"):
        ltloss.LongTailLoss.from_counts([9, 3, 1], D, form="best")


def test_long_tail_loss_takes_a_log_prior(backend: str) -> None:
    counts = long_tail_counts(C)
    module = ltloss.LongTailLoss.from_counts(counts, D, tau=1.5)
    prior = log_prior_from_counts(counts, 1.5)
    given = ltloss.LongTailLoss.from_counts(counts, D, log_prior=prior)
    given.load_state_dict(dict(module.state_dict()))
    features, labels = batch()
    assert torch.equal(module(features, labels), given(features, labels))
    assert torch.equal(module.log_prior, prior)
    assert "tau=1.5" in repr(module)
    assert torch.equal(ltloss.LongTailLoss.from_counts(counts, D, tau=1).log_prior, log_prior_from_counts(counts, 1.0))
    assert ltloss.LongTailLoss.from_counts(counts, D).log_prior is None
    with refused("log_prior", "tau"):
        ltloss.LongTailLoss.from_counts(counts, D, tau=1.0, log_prior=prior)


def test_long_tail_loss_takes_a_function_of_the_length() -> None:
    module = ltloss.LongTailLoss.from_counts([5, 1], 2, feature_norm=lambda r: r * 7.0)
    module(torch.tensor([[3.0, 4.0]]), torch.tensor([0]))
    assert float(module.terms["feature_norm"]) == pytest.approx(35.0)


def _with_weight(module: ltloss.PrototypeHead, weight: Tensor):  # type: ignore[no-untyped-def]
    return lambda x, y: torch.func.functional_call(module, {"weight": weight}, (x, y))


def test_gradient_of_the_long_tail_loss_reaches_everything() -> None:
    module = ltloss.LongTailLoss.from_counts(long_tail_counts(C), D)
    given = problem(7, C, D, dtype=torch.float32)
    grads = outcome(given, loss=lambda x, w, y: _with_weight(module, w)(x, y))
    assert bool(grads.features[given.labels >= 0].any(1).all())
    assert bool(grads.prototypes.any(1).all())
