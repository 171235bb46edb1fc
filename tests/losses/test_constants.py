"""Margins, priors, weights and counts keep their values, whatever happens to the module around them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from torch import Tensor

import ltloss
from ltloss.functional import margin_cross_entropy
from ltloss.testing import MODULES, problem


def _constants(module: torch.nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    return {name: buffer.clone() for name, buffer in module.named_buffers() if name not in state}


def _loss(module: torch.nn.Module) -> Tensor:
    features, _, labels = problem(7, 9, 5, dtype=torch.float32)
    return module(features, labels).detach()


@pytest.mark.parametrize("name", MODULES)
def test_from_the_meta_device(name: str) -> None:
    """What FSDP2 does: build without memory, give it memory, initialise."""
    whole, module = MODULES[name](9, 5), MODULES[name](9, 5, device="meta")
    module.to_empty(device="cpu")
    module.reset_parameters()
    for key, value in _constants(whole).items():
        assert torch.equal(_constants(module)[key], value)
    module.load_state_dict(whole.state_dict())
    assert torch.equal(_loss(module.eval()), _loss(copy.deepcopy(whole).eval()))


def test_where_meta_is_the_default_device() -> None:
    counts = list(range(1, 10))
    with torch.device("meta"):
        module = ltloss.LongTailLoss.from_counts(counts, 5)
    module.to_empty(device="cpu")
    for key, value in _constants(ltloss.LongTailLoss.from_counts(counts, 5)).items():
        assert torch.equal(_constants(module)[key], value)
    with refused("class_counts", "meta"):
        ltloss.LogitAdjustedLoss.from_counts(torch.ones(3, device="meta"), 5)


@pytest.mark.parametrize("name", MODULES)
def test_half_precision_rounds_the_weight_only(name: str) -> None:
    module = MODULES[name](9, 5)
    before = _constants(module)
    module.to(torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    for key, value in before.items():
        assert _constants(module)[key].dtype == value.dtype
        assert torch.equal(_constants(module)[key], value)


def test_centres_keep_their_precision() -> None:
    module = ltloss.CosineSpaceLoss(9, 5)
    _loss(module)
    centers = module.centers.centers.clone()
    module.half()
    assert torch.equal(module.centers.centers, centers)


def test_weights_that_were_replaced_stay_replaced() -> None:
    module = ltloss.ArcFaceLoss(9, 5, class_weight=torch.ones(9))
    module.set_class_weight(torch.arange(1.0, 10.0))
    assert torch.equal(module.to(torch.float64).class_weight, torch.arange(1.0, 10.0))
    module.set_class_weight(None)
    assert module.float().class_weight is None


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (lambda: ltloss.LogitAdjustedLoss.from_counts([3, 1], 4), "tau"),
        (lambda: ltloss.LDAMLoss.from_counts([3, 1], 4), "max_margin"),
        (lambda: ltloss.LongTailLoss.from_counts([3, 1], 4), "margin"),
        (lambda: ltloss.LongTailLoss.from_counts([3, 1], 4), "tau"),
    ],
)
def test_what_constants_were_made_from_cannot_be_set(module: object, name: str) -> None:
    built = module()  # type: ignore[operator]
    shown = repr(built)
    with refused(name, type(built).__name__, error=AttributeError):
        setattr(built, name, 0.25)
    assert repr(built) == shown


def test_what_is_read_at_every_step_can_be_set() -> None:
    module = ltloss.CosFaceLoss(9, 5, scale=8.0)
    before = _loss(module)
    module.scale = 16.0
    assert "scale=16" in repr(module)
    assert _loss(module) != before


@pytest.mark.parametrize(
    ("margin", "value"), [(28.6, "28.6"), (-3.2, "-3.2"), (torch.full((9,), 28.6), "28.6")], ids=["28.6", "-3.2", "9"]
)
def test_degrees_are_refused(margin: Tensor | float, value: str) -> None:
    with refused("angular_margin", value):
        ltloss.ArcFaceLoss(9, 5, margin=margin)
    module = ltloss.ArcFaceLoss(9, 5)
    with refused("angular_margin", value):
        module.angular_margin = margin
    assert module.angular_margin == 0.5
    with refused("angular_margin", value):
        margin_cross_entropy(*problem(), angular_margin=margin)


BEYOND = [(28.6, "28.6"), (-2.1, "-2.1"), (torch.full((9,), 28.6), "28.6")]


@pytest.mark.parametrize(("margin", "value"), BEYOND, ids=["28.6", "-2.1", "9"])
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda margin: ltloss.CosFaceLoss(9, 5, margin=margin), "margin"),
        (lambda margin: ltloss.CosineSpaceLoss(9, 5, margin=margin), "margin"),
        (lambda margin: ltloss.CombinedMarginLoss(9, 5, cosine_margin=margin), "cosine_margin"),
        (lambda margin: setattr(ltloss.CosFaceLoss(9, 5), "cosine_margin", margin), "cosine_margin"),
        (lambda margin: setattr(ltloss.CosineSpaceLoss(9, 5), "margin", margin), "margin"),
        (lambda margin: margin_cross_entropy(*problem(), cosine_margin=margin), "cosine_margin"),
    ],
)
def test_a_cosine_margin_beyond_what_cosines_span_is_refused(
    build: Callable[..., Any], name: str, margin: Tensor | float, value: str
) -> None:
    with refused(name, "[-2, 2]", "cosine", value):
        build(margin)
    for end in (-2.0, 2.0, torch.linspace(-2.0, 2.0, 9)):
        build(end)


@pytest.mark.parametrize(
    ("build", "facts"),
    [
        (lambda margin: ltloss.LDAMLoss.from_counts([30, 3], 4, max_margin=margin), ("max_margin", "[-2, 2]", "28.6")),
        (lambda margin: ltloss.ElasticFaceLoss(9, 5, kind="cos", mean=margin), ("mean", "[-2, 2]", "28.6")),
        (lambda margin: ltloss.ElasticFaceLoss(9, 5, mean=margin), ("mean", "[-π, π]", "radians", "28.6")),
        (lambda margin: ltloss.AdaFaceLoss(9, 5, margin=margin), ("margin", "1.0", "28.6")),
        (lambda margin: ltloss.ArcFaceLoss(9, 5, margin=margin), ("margin", "radians", "28.6")),
        (lambda margin: ltloss.CurricularFaceLoss(9, 5, margin=margin), ("margin", "radians", "28.6")),
        (lambda margin: ltloss.LongTailLoss.from_counts([3, 1], 4, margin=margin), ("margin", "radians", "28.6")),
    ],
)
def test_a_margin_is_refused_by_the_name_that_was_given(build: Callable[..., Any], facts: tuple[str, ...]) -> None:
    with refused(*facts):
        build(28.6)


def test_a_negative_tau_is_refused() -> None:
    with refused("tau", "-1.0"):
        ltloss.LogitAdjustedLoss.from_counts([3, 1], 4, tau=-1.0)
    with refused("tau", "-1.0"):
        ltloss.class_balance.log_prior_from_counts([3, 1], tau=-1.0)


def test_numpy_numbers_are_numbers() -> None:
    given = problem()
    assert torch.equal(
        margin_cross_entropy(*given, angular_margin=np.float32(0.5)), margin_cross_entropy(*given, angular_margin=0.5)
    )


@pytest.mark.parametrize(
    ("counts", "given"), [(Counter([0, 0, 1]), "Counter"), (["3", "1"], "list"), ("31", "str")], ids=repr
)
def test_counts_of_another_kind_are_refused(counts: object, given: str) -> None:
    with refused("class_counts", given, error=TypeError):
        ltloss.LogitAdjustedLoss(2, 4, class_counts=counts)  # type: ignore[arg-type]


def test_a_vector_that_was_set_later_outlives_a_move() -> None:
    module = ltloss.LDAMLoss.from_counts([16, 1], 8)
    module.cosine_margin = torch.tensor([0.1, 0.2])
    assert torch.equal(module.double().cosine_margin, torch.tensor([0.1, 0.2]))
    with refused("cosine_margin", "(2,)", "(3,)"):
        module.cosine_margin = torch.zeros(3)
    with refused("class_counts", error=AttributeError):
        ltloss.LongTailLoss.from_counts([3, 1], 4).class_counts = torch.ones(2)


@pytest.mark.parametrize(
    ("module", "name"), [(ltloss.CombinedMarginLoss(9, 5), "angular_margin"), (ltloss.CosineSpaceLoss(9, 5), "margin")]
)
def test_numbers_and_vectors_take_each_others_place(module: ltloss.PrototypeHead, name: str) -> None:
    """Whatever was set before, the loss is that of a module made with the new value."""
    for value in (
        0.3,
        torch.linspace(0.1, 0.5, 9),
        0.2,
        torch.linspace(0.3, 0.4, 9),
        torch.tensor(0.25),
        np.float32(0.5),
    ):
        setattr(module, name, value)
        made = type(module)(9, 5, **{name: value})
        made.load_state_dict(module.state_dict())
        module.eval(), made.eval()
        assert torch.equal(_loss(module.double().float()), _loss(made))
        assert repr(module) == repr(made)
        assert isinstance(getattr(module, name), Tensor if isinstance(value, Tensor) and value.dim() else float)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(1), torch.tensor(0.5)])
def test_numbers_of_other_kinds_are_numbers(number: Any) -> None:
    plain = float(number)
    for make in (
        lambda x: ltloss.LongTailLoss.from_counts([3, 1], 4, scale=x, margin=x, tau=x, min_angle_weight=x),
        lambda x: ltloss.LDAMLoss.from_counts([3, 1], 4, max_margin=x, label_smoothing=x),
        lambda x: ltloss.LogitAdjustedLoss.from_counts([3, 1], 4, tau=x, angle_multiplier=x),
        lambda x: ltloss.CosineSpaceLoss(2, 4, scale=x, margin=x, epsilon=x),
        lambda x: ltloss.CombinedMarginLoss(2, 4, scale=x, angular_margin=x, cosine_margin=x),
    ):
        assert repr(make(number)) == repr(make(plain))


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        ("LongTailLoss", "min_angle_classes", "All"),
        ("LongTailLoss", "min_angle_weight", -1.0),
        ("LongTailLoss", "min_angle_power", -1.0),
        ("LongTailLoss", "feature_norm_weight", -1.0),
        ("LongTailLoss", "feature_norm_radius", 0.0),
        ("LongTailLoss", "feature_norm", "Ring"),
        ("CosineSpaceLoss", "truncate", "Batch"),
        ("CosineSpaceLoss", "epsilon", -0.1),
        ("CosineSpaceLoss", "start_step", -1),
        ("CosineSpaceLoss", "intra_weight", -1.0),
        ("CosineSpaceLoss", "label_smoothing", 2.0),
        ("AdaFaceLoss", "margin", -0.1),
        ("AdaFaceLoss", "concentration", -1.0),
        ("AdaFaceLoss", "momentum", 1.5),
        ("MagFaceLoss", "max_length", 0.5),
        ("MagFaceLoss", "min_length", 7.0),
        ("MagFaceLoss", "min_margin", 0.9),
        ("MagFaceLoss", "penalty_weight", -1.0),
        ("ElasticFaceLoss", "kind", "Arc"),
        ("ElasticFaceLoss", "std", -0.5),
        ("CurricularFaceLoss", "momentum", 1.5),
        ("InterclassFilterLoss", "filter_threshold", 1.5),
    ],
)
def test_an_option_that_is_set_later_is_checked(module: str, name: str, value: float | str) -> None:
    built = MODULES[module](9, 5)
    before = getattr(built, name)
    with refused(name, repr(value)):
        setattr(built, name, value)
    with refused(name, "tuple", error=TypeError) if name not in CHOICES else refused(name, "()"):
        setattr(built, name, ())
    assert getattr(built, name) == before
    setattr(built, name, np.float64(before) if isinstance(before, float) else before)
    assert type(getattr(built, name)) is type(before)


CHOICES = ("min_angle_classes", "feature_norm", "truncate", "kind")


@pytest.mark.parametrize(("name", "value"), [("update_rule", "Mean"), ("momentum", 1.0), ("momentum", -0.1)])
def test_an_option_of_the_centres_that_is_set_later_is_checked(name: str, value: float | str) -> None:
    centers = ltloss.ClassCenters(9, 5)
    with refused(name, repr(value)):
        setattr(centers, name, value)
    assert (centers.update_rule, centers.momentum) == ("mean", 0.9)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_set_later_is_checked(scale: float) -> None:
    module = ltloss.ArcFaceLoss(9, 5, scale=8.0)
    with refused("scale", str(scale)):
        module.scale = scale
    assert module.scale == 8.0
