from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.refusals import refused

import ltloss
from ltloss.errors import UserError
from ltloss.training.comparison.climb import next_points
from ltloss.training.comparison.grid import ComparisonSpec
from ltloss.training.comparison.methods import METHODS, listing, method, search_space, with_values
from ltloss.training.comparison.recipes import recipe
from ltloss.training.model.registry import build_loss
from ltloss.training.run.settings import Settings

COUNTS = [81, 16, 1]


def plan(*methods: str, **changes: object) -> ComparisonSpec:
    asked = {"recipe": "small", "seeds": 1, "vary": {}, "tune": False, "tune_seeds": 1, "validation_per_class": None}
    given = {"data": "digits", "device": "cpu", **changes.pop("given", {})}  # type: ignore[dict-item]
    return ComparisonSpec(given=given, methods=methods, **{**asked, **changes})  # type: ignore[arg-type]


def loss_of(name: str, **values: object) -> ltloss.CombinedMarginLoss:
    settings = Settings(**plan(name).job(name, {}, values, 0, "").settings)
    head = build_loss(settings.loss, COUNTS, 8, settings.all_loss_options)
    assert isinstance(head, ltloss.CombinedMarginLoss)
    return head


def test_every_method_tunes_values_that_are_in_order_and_begins_in_their_middle() -> None:
    for name, kind in METHODS.items():
        space = search_space(name, recipe("small"))
        assert math.prod(len(values) for values in space.values()) >= 9, name
        assert all(values == sorted(set(values)) for values in space.values()), name
        begins = next_points(space, [])[0]
        at_rest = {"margin": (0.35, 0.5), "lr": (0.1,), "weight_decay": (5e-4,), "tau": (1.0,), "crt_epochs": (10,)}
        assert all(begins[key] in at_rest[key] for key in begins if key in at_rest), name
        if "margin" in kind.settings:
            assert begins["margin"] == kind.settings["margin"], name


def test_every_method_makes_a_job_and_says_where_it_is_from() -> None:
    every = plan(*METHODS, tune=True, validation_per_class=1)  # which checks the whole of every search space
    for name, kind in METHODS.items():
        assert every.job(name, {}, {}, 0, "").settings["seed"] == 0
        assert kind.source or name == "ce"
        assert f"\n{name}: {kind.title}" in f"\n{listing()}"


def test_margins_of_the_published_methods() -> None:
    rarest_first = torch.tensor(COUNTS, dtype=torch.float64) ** -0.25
    torch.testing.assert_close(loss_of("ldam", margin=0.4).cosine_margin, (0.4 * rarest_first).float())  # n = 1: 0.4
    torch.testing.assert_close(loss_of("long-tail").angular_margin, (0.5 * rarest_first).float())
    assert loss_of("long-tail").log_prior is None
    prior = (torch.tensor(COUNTS) / sum(COUNTS)).log()
    for name in ("logit-adjusted", "long-tail-prior"):
        torch.testing.assert_close(loss_of(name, tau=1.5).log_prior, 1.5 * prior)
    torch.testing.assert_close(loss_of("arcface", tau=1.0).log_prior, prior)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("long-tail", {}),
        ("long-tail-prior", {"tau": 1, "margin_normalize": "max", "min_angle_weight": 0, "feature_norm_weight": 0}),
    ],
)
def test_a_name_means_one_loss_in_train_compare_and_python(name: str, values: dict[str, Any]) -> None:
    compared, shown = loss_of(name), ltloss.LongTailLoss.from_counts(COUNTS, 8, **values)
    trained = build_loss(name, COUNTS, 8, Settings(loss=name).all_loss_options)
    for ours in (compared, trained):
        assert repr(ours) == repr(shown)
        assert torch.equal(ours.angular_margin, shown.angular_margin)


def test_weights_of_deferred_and_class_balanced_methods() -> None:
    both = plan("ldam-drw", "class-balanced", recipe="cifar-lt")
    drw, balanced = (Settings(**both.job(name, {}, {}, 0, "").settings) for name in both.methods)
    assert (drw.loss, drw.drw_start, drw.beta, drw.epochs) == ("ldam", 0.8, 0.9999, 200)
    assert (balanced.loss, balanced.drw_start) == ("softmax", 0.0)


def test_factors_multiply_the_recipe_and_what_is_given_is_not_tuned() -> None:
    assert search_space("ce", {"lr": 0.2})["lr"] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6]
    fixed = plan("ce", "cosine", "arcface", given={"lr": 0.3, "scale": 12.0})
    assert list(fixed.space("ce")) == ["weight_decay"]
    assert fixed.space("cosine") == {}
    assert list(fixed.space("arcface")) == ["margin"]
    jobs = {name: fixed.job(name, {}, {}, 0, "").settings for name in fixed.methods}
    assert {name: (job["lr"], job.get("scale")) for name, job in jobs.items()} == {
        "ce": (0.3, None),
        "cosine": (0.3, 12.0),
        "arcface": (0.3, 12.0),
    }


def test_what_is_given_wins_over_the_method_and_variants_over_both() -> None:
    asked = plan("long-tail", given={"loss_options": {"margin_power": 0.5}, "tau": 2.0}, vary={"tau": [0, 1]})
    settings = Settings(**asked.job("long-tail", {"long-tail": {"scale": 8.0}}, {"tau": 1}, 3, "").settings)
    assert (settings.tau, settings.scale, settings.seed, settings.loss_options["margin_power"]) == (1.0, 8.0, 3, 0.5)


def test_variants_are_every_combination() -> None:
    assert plan("long-tail", vary={}).variants == [{}]
    both = plan("long-tail", vary={"tau": [1, 2], "scale": [8]}).variants
    assert both == [{"tau": 1, "scale": 8}, {"tau": 2, "scale": 8}]


def test_values_go_to_settings_or_to_the_options_of_the_loss() -> None:
    merged = with_values({"lr": 1, "loss_options": {"x": 1}}, {"lr": 2, "y": 3})
    assert merged == {"lr": 2, "loss_options": {"x": 1, "y": 3}}


def test_the_same_training_has_the_same_key_whatever_it_is_called() -> None:
    asked = plan("logit-adjusted", "ce", "post-hoc")
    key = asked.job("ce", {}, {}, 0, "p").key
    assert asked.job("post-hoc", {}, {}, 0, "p").base.key == key  # type: ignore[union-attr]
    moved = plan("ce", given={"data": "digits", "many_threshold": 7, "few_threshold": 3, "workers": 1})
    assert moved.job("ce", {}, {}, 0, "p").key == key
    others = [
        asked.job("ce", {}, {}, 1, "p"),
        asked.job("ce", {}, {}, 0, "q"),
        asked.job("ce", {}, {"lr": 1.0}, 0, "p"),
    ]
    others += [asked.job("ce", {}, {}, 0, "p", 3), asked.job("post-hoc", {}, {}, 0, "p")]
    assert len({key, *(job.key for job in others)}) == 6


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"given": {"loss": "ldam"}}, ("loss",)),
        ({"given": {"epoch": 3}}, ("epoch", "epochs")),
        ({"given": {"margn": 3}}, ("margn", "margin")),
        ({"given": {"lr": -1.0}}, ("lr", "0", "-1.0")),
        ({"given": {"loss_options": {"margin_power": 1}}}, ("softmax", "margin_power", "tau")),
        ({"given": {"data": ""}}, ("--data",)),
        ({"recipe": "tiny"}, ("--recipe", "tiny")),
        ({"seeds": 0}, ("seeds", "1", "0")),
        ({"tune_seeds": 1.5}, ("tune_seeds", "1", "1.5")),
        ({"validation_per_class": 0}, ("validation_per_class", "1", "0")),
        ({"vary": {"margin": [1.0]}}, ("softmax", "margin")),
        ({"vary": {"seed": [1]}}, ("--vary", "seed")),
        ({"vary": {"lr": []}}, ("--vary", "lr")),
        ({"vary": {"data": ["a.npz", "b.npz"]}}, ("--vary", "data", "in common")),
        ({"vary": {"many_threshold": [50, 100]}}, ("--vary", "many_threshold", "in common")),
        ({"vary": {"mixup": [-1.0]}}, ("mixup", "0", "-1.0")),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    changes: dict[str, object], facts: tuple[str, ...]
) -> None:
    with refused(*facts, error=UserError):
        plan("ce", **changes)


def test_unknown_methods_are_named() -> None:
    with refused("--losses", "ldamdrw", "ldam-drw", error=UserError):
        plan("ce", "ldamdrw")
    with refused("--losses", error=UserError):
        plan()
    with refused("norm_power", "0", "-1", error=UserError):
        plan("tau-norm", vary={"norm_power": [-1]})
    with refused("crt_epochs", "1", "0.5", error=UserError):
        plan("crt", vary={"crt_epochs": [0.5]})
    assert method("crt").base == "ce"
