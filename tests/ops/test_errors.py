"""Wrong arguments: the message names the argument, what was given and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.refusals import refused

import ltloss
from ltloss.extend import logsumexp_stats
from ltloss.functional import (
    cosine_logsumexp,
    feature_norm_penalty,
    margin_cross_entropy,
    min_angle_regularizer,
    nearest_prototype,
    top_k,
)

pytestmark = pytest.mark.usefixtures("backend")

X, W, Y = torch.randn(3, 5), torch.randn(4, 5), torch.tensor([0, 1, 2])
META, F8, E5M2 = "meta", torch.float8_e4m3fn, torch.float8_e5m2

# what is wrong -> (features, prototypes, labels), the error, the facts that the message must state
SUPERVISED: dict[str, tuple[tuple[Any, Any, Any], type[Exception], tuple[str, ...]]] = {
    "features no tensor": (([[1.0]], W, Y), TypeError, ("features", "torch.Tensor", "(N, D)", "list")),
    "features 1-d": ((X[0], W, Y), ValueError, ("features", "(N, D)", "(5,)")),
    "features 3-d": ((X[None], W, Y), ValueError, ("features", "(N, D)", "(1, 3, 5)")),
    "features integer": ((X.long(), W, Y), TypeError, ("features", "torch.int64")),
    "features complex": ((X + 0j, W, Y), TypeError, ("features", "torch.complex64")),
    "features sparse": ((X.to_sparse(), W, Y), TypeError, ("features", "torch.sparse_coo")),
    "features float8": ((X.to(F8), W, Y), TypeError, ("features", "float16", "float32", "torch.float8_e4m3fn")),
    "features without columns": ((X[:, :0], W[:, :0], Y), ValueError, ("features", "(3, 0)")),
    "prototypes no tensor": ((X, None, Y), TypeError, ("prototypes", "torch.Tensor", "(C, D)", "NoneType")),
    "prototypes 1-d": ((X, W[0], Y), ValueError, ("prototypes", "(C, D)", "(5,)")),
    "prototypes integer": ((X, W.int(), Y), TypeError, ("prototypes", "torch.int32")),
    "prototypes sparse": ((X, W.to_sparse(), Y), TypeError, ("prototypes", "torch.sparse_coo")),
    "prototypes float8_e5m2": ((X, W.to(E5M2), Y), TypeError, ("prototypes", "float8_e4m3fn", "torch.float8_e5m2")),
    "no prototypes": ((X, W[:0], Y), ValueError, ("prototypes", "(0, 5)")),
    "widths differ": ((X, W[:, :4], Y), ValueError, ("features", "prototypes", "(3, 5)", "(4, 4)")),
    "labels no tensor": ((X, W, [0, 1, 2]), TypeError, ("labels", "torch.Tensor", "(N,)", "list")),
    "labels floating": ((X, W, Y.float()), TypeError, ("labels", "torch.float32")),
    "labels boolean": ((X, W, Y.bool()), TypeError, ("labels", "torch.bool")),
    "labels too short": ((X, W, Y[:2]), ValueError, ("labels", "(3,)", "(2,)")),
    "labels one-hot": ((X, W, torch.eye(3, 4).long()), ValueError, ("labels", "(3,)", "(3, 4)")),
    "prototypes elsewhere": ((X, W.to(META), Y), ValueError, ("features", "cpu", "prototypes", "meta")),
    "labels elsewhere": ((X, W, Y.to(META)), ValueError, ("features", "cpu", "labels", "meta")),
}


@pytest.mark.parametrize("what", SUPERVISED)
@pytest.mark.parametrize("function", [margin_cross_entropy, cosine_logsumexp])
def test_features_prototypes_and_labels(what: str, function: Callable[..., Any]) -> None:
    arguments, error, facts = SUPERVISED[what]
    options = {"scale": 3.0} if function is cosine_logsumexp else {}
    with refused(*facts, error=error):
        function(*arguments, **options)


@pytest.mark.parametrize("what", [what for what in SUPERVISED if "labels" not in what])
def test_features_and_prototypes_of_the_search(what: str) -> None:
    (features, prototypes, _), error, facts = SUPERVISED[what]
    with refused(*facts, error=error):
        top_k(features, prototypes)


@pytest.mark.parametrize("what", [what for what in SUPERVISED if "prototypes" in what and "elsewhere" not in what])
@pytest.mark.parametrize("function", [nearest_prototype, min_angle_regularizer])
def test_prototypes_alone(what: str, function: Callable[..., Any]) -> None:
    (_, prototypes, _), error, facts = SUPERVISED[what]
    with refused(*facts, error=error):
        function(prototypes)


@pytest.mark.parametrize("what", [what for what in SUPERVISED if what.startswith("features")])
def test_features_alone(what: str) -> None:
    (features, _, _), error, facts = SUPERVISED[what]
    with refused(*facts, error=error):
        feature_norm_penalty(features)


OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "scale zero": ({"scale": 0.0}, ValueError, ("scale", "0.0", "0.0")),
    "scale negative": ({"scale": -3}, ValueError, ("scale", "0.0", "-3")),
    "scale infinite": ({"scale": float("inf")}, ValueError, ("scale", "inf")),
    "scale text": ({"scale": "30"}, TypeError, ("scale", "str", "'30'")),
    "scale boolean": ({"scale": True}, TypeError, ("scale", "bool", "True")),
    "scale tensor": ({"scale": torch.ones(4)}, TypeError, ("scale", "Tensor")),
    "multiplier": ({"angle_multiplier": 0.0}, ValueError, ("angle_multiplier", "0.0", "0.0")),
    "smoothing above": ({"label_smoothing": 1.5}, ValueError, ("label_smoothing", "0.0", "1.0", "1.5")),
    "smoothing below": ({"label_smoothing": -0.1}, ValueError, ("label_smoothing", "0.0", "-0.1")),
    "beyond_pi": ({"beyond_pi": "mono"}, ValueError, ("beyond_pi", "monotone", "arcface", "'mono'")),
    "gradient": ({"margin_gradient": "ste"}, ValueError, ("margin_gradient", "exact", "straight_through", "'ste'")),
    "reduction": ({"reduction": "avg"}, ValueError, ("reduction", "none", "mean", "sum", "'avg'")),
    "ignore_index": ({"ignore_index": 1.5}, TypeError, ("ignore_index", "1.5")),
    "normalize_features": ({"normalize_features": "no"}, TypeError, ("normalize_features", "bool", "'no'")),
    "weight negative": ({"class_weight": -1.0}, ValueError, ("class_weight", "-1")),
    "weight of a class": (
        {"class_weight": torch.tensor([1.0, 2.0, 3.0, -2.0])},
        ValueError,
        ("class_weight", "-2", "3"),
    ),
}
for _name in ("angular_margin", "cosine_margin", "log_prior", "class_weight"):
    OPTIONS |= {
        f"{_name} shape": ({_name: torch.ones(3)}, ValueError, (_name, "(4,)", "(3,)")),
        f"{_name} matrix": ({_name: torch.ones(4, 1)}, ValueError, (_name, "(4,)", "(4, 1)")),
        f"{_name} list": ({_name: [0.1] * 4}, TypeError, (_name, "(4,)", "list")),
        f"{_name} boolean": ({_name: True}, TypeError, (_name, "bool")),
        f"{_name} elsewhere": ({_name: torch.ones(4, device=META)}, ValueError, (_name, "meta")),
        f"{_name} NaN": ({_name: float("nan")}, ValueError, (_name, "NaN")),
        f"{_name} NaN of a class": (
            {_name: torch.tensor([0.0, 0.0, float("nan"), 0.0])},
            ValueError,
            (_name, "NaN", "2"),
        ),
        f"{_name} infinite": ({_name: float("inf")}, ValueError, (_name, "inf")),
        f"{_name} infinite for a class": (
            {_name: torch.tensor([0.0, float("inf"), 0.0, 0.0])},
            ValueError,
            (_name, "inf", "1"),
        ),
    }
for _name in ("angular_margin", "cosine_margin", "class_weight"):
    OPTIONS[f"{_name} gradient"] = ({_name: torch.ones(4, requires_grad=True)}, ValueError, (_name,))
OF_THE_FUNCTION: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {}  # not of every module
for _name, _margin, _shown in (
    ("angular_margin", 0.3, "0.3"),
    ("cosine_margin", torch.zeros(4), "4"),
    ("angle_multiplier", 2.0, "2"),
):
    _given = {_name: _margin, "normalize_prototypes": False}
    OF_THE_FUNCTION[f"{_name} on products"] = (_given, ValueError, (_name, _shown, "normalize_prototypes", "False"))
OF_THE_FUNCTION |= {
    "normalize_prototypes": ({"normalize_prototypes": 1}, TypeError, ("normalize_prototypes", "bool", "1")),
    "bias number": ({"bias": 0.1}, TypeError, ("bias", "(4,)", "0.1")),
    "bias shape": ({"bias": torch.ones(3)}, ValueError, ("bias", "(4,)", "(3,)")),
    "bias infinite": ({"bias": torch.tensor([0.0, 0.0, -torch.inf, 0.0])}, ValueError, ("bias", "-inf", "2")),
}


@pytest.mark.parametrize("what", OPTIONS | OF_THE_FUNCTION)
def test_options(what: str) -> None:
    options, error, facts = (OPTIONS | OF_THE_FUNCTION)[what]
    with refused(*facts, error=error):
        margin_cross_entropy(X, W, Y, **options)


def test_a_prior_that_takes_out_the_class_of_a_sample() -> None:
    prior = torch.tensor([0.0, float("-inf"), 0.0, 0.0])
    without = [torch.tensor(labels) for labels in ([0, 2, -100], [0, 2, 1])]
    for labels, ignored in zip(without, (-100, 1), strict=True):
        assert bool(margin_cross_entropy(X, W, labels, log_prior=prior, ignore_index=ignored).isfinite())
    for function in (
        margin_cross_entropy,
        lambda *given, log_prior: logsumexp_stats(*given, scale=3.0, log_prior=log_prior),
    ):
        with refused("log_prior", "-inf", "1", "2"):
            function(X, W, torch.tensor([0, 2, 1], dtype=torch.uint8), log_prior=prior)
    several = torch.tensor([[0, 2], [-100, 1], [3, 1]])  # the second does not count
    with refused("log_prior", "-inf", "class 1", "position 2"):
        logsumexp_stats(X, W, several, scale=3.0, log_prior=prior)
    logsumexp_stats(X[:2], W, several[:2], scale=3.0, log_prior=prior)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor(0.5).double()])
@pytest.mark.parametrize("name", ["scale", "angle_multiplier", "label_smoothing", "angular_margin", "cosine_margin"])
def test_numbers_of_numpy_and_tensors_without_dimensions_are_numbers(name: str, number: object) -> None:
    assert torch.equal(margin_cross_entropy(X, W, Y, **{name: number}), margin_cross_entropy(X, W, Y, **{name: 0.5}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("what", [what for what in OPTIONS if not what.endswith(("gradient", "elsewhere"))])
def test_modules_refuse_bad_options_when_they_are_made(what: str, device: str) -> None:
    options, error, facts = OPTIONS[what]
    with refused(*facts, error=error):
        ltloss.CombinedMarginLoss(4, 5, **options, device=device)
