"""Prototypes in float8 with an exponent for each class: the format, what reads it, and the update that writes it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.prototype_steps import train_steps
from helpers.refusals import refused
from torch import Tensor

import ltloss
from ltloss.float8 import FLOAT8, decoded, power_of_two, scaled_down, widened, write_rows
from ltloss.functional import nearest_prototype
from ltloss.interop import import_pytorch_metric_learning
from ltloss.numerics import inverse_norm
from ltloss.optim import PrototypeAdagrad, PrototypeAdamW, PrototypeSGD
from ltloss.optim.rounding import round_stochastically
from ltloss.testing import MODULES, problem, relative_error

CODES = torch.arange(256, dtype=torch.uint8).view(FLOAT8)
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda m, **o: PrototypeSGD(m, lr=0.3, momentum=0.9, weight_decay=0.01, **o),
    "AdamW": lambda m, **o: PrototypeAdamW(m, lr=0.05, max_class_norm=0.1, **o),
    "Adagrad": lambda m, **o: PrototypeAdagrad(m, lr=0.1, **o),
}


def _values(head: Any) -> Tensor:
    return decoded(head.weight.detach(), head.weight_exponent)


def _pair(name: str, classes: int = 9, width: int = 5) -> tuple[Any, Any]:
    """A head in float8, and one in float32 with the same prototypes."""
    torch.manual_seed(0)
    narrow = MODULES[name](classes, width, dtype=FLOAT8)
    wide = MODULES[name](classes, width)
    wide.load_state_dict(narrow.state_dict())
    return narrow, wide


# The format


def test_every_code_is_read_as_pytorch_reads_it() -> None:
    theirs, found = CODES.float(), widened(CODES)
    nan = theirs.isnan()
    assert int(nan.sum()) == 2
    assert torch.equal(found[~nan], theirs[~nan])
    assert inverse_norm(CODES[:, None], torch.float32)[nan].isnan().all()


def test_powers_of_two_are_exact() -> None:
    exponent = torch.arange(-126, 128, dtype=torch.int8)
    assert power_of_two(exponent).tolist() == [2.0**number for number in range(-126, 128)]


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 447.9, 448.0, 449.0, 1e30])
def test_the_exponent_is_the_smallest_that_fits(size: float) -> None:
    rows = torch.tensor([[size, -size / 3], [-size, 0.0]])
    exponent, scaled = scaled_down(rows.clone())
    assert bool(((scaled.abs().amax(1) >= 224) & (scaled.abs().amax(1) < 448)).all())
    assert torch.equal(scaled * power_of_two(exponent)[:, None], rows)


def test_rows_without_a_direction() -> None:
    weight, exponent = torch.ones(4, 3).to(FLOAT8), torch.ones(4, dtype=torch.int8)
    given = torch.tensor([[0.0, 0.0, 0.0], [1.0, torch.inf, 0.0], [torch.nan, 1.0, 0.0], [2.0, 0.0, -0.0]])
    write_rows(weight, exponent, 0, given)
    assert weight[0].float().tolist() == [0.0, 0.0, 0.0]
    assert weight[1:3].float().isnan().all()
    assert decoded(weight[3:], exponent[3:]).tolist() == [[2.0, 0.0, -0.0]]


@pytest.mark.parametrize("value", [1.3, -200.7, 447.9, 2.0**-6 * 0.99, -0.01, 3e-4, 0.0, -448.0])
def test_the_mean_of_every_rounding_is_the_value(value: float) -> None:
    """All 2^16 random numbers, once each. A unit is cut into 2^20 parts of which 2^16 are told apart."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    rounded = torch.empty(1 << 16, dtype=FLOAT8)
    round_stochastically(torch.full((1 << 16,), value), every, rounded)
    unit = 2.0**-3 * max(2.0**-6, 2.0 ** torch.tensor(abs(value) or 1e-9).log2().floor().item())
    assert float(rounded.double().mean()) == pytest.approx(value, abs=unit * 2.0**-17)
    neighbours = rounded.float().unique()
    assert len(neighbours) <= 2
    assert bool(((neighbours - value).abs() < unit).all())


# What reads it


@pytest.mark.parametrize("name", MODULES)
def test_losses_are_those_of_the_same_prototypes_in_float32(name: str) -> None:
    narrow, wide = _pair(name)
    optimizer = PrototypeSGD(narrow, lr=0.0, rounding="nearest")
    features, _, labels = problem(16, 9, 5, dtype=torch.float32)
    gradients, losses = [], []
    for head in (narrow, wide):
        leaf = features.clone().requires_grad_()
        loss = head(leaf, labels)
        loss.sum().backward()
        losses.append(loss.detach())
        gradients.append(leaf.grad)
    optimizer.step()
    assert relative_error(*losses) < 1e-6
    assert relative_error(*gradients) < 1e-5
    with torch.no_grad():
        assert relative_error(narrow.logits(features), wide.logits(features)) < 1e-6
    assert torch.equal(narrow.predict(features, 3).index, wide.predict(features, 3).index)


def test_searches_tell_equal_prototypes_apart_by_their_class() -> None:
    narrow, _ = _pair("ArcFaceLoss", 50, 8)
    with torch.no_grad():
        narrow.weight[20], narrow.weight[30] = narrow.weight[3], narrow.weight[3]
        narrow.weight_exponent[30] += 1  # twice as long: the same direction
        found = nearest_prototype(narrow.weight).index
    assert found[[3, 20, 30]].tolist() == [20, 3, 3]
    assert narrow.predict(widened(narrow.weight[3:4].detach()), 3).index.tolist() == [[3, 20, 30]]


# What writes it


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ["CosFaceLoss", "LongTailLoss", "CosineSpaceLoss"])
def test_a_step_is_that_of_float32_up_to_the_rounding(name: str, kind: str) -> None:
    """To the nearest: half a unit, 1/16 of an entry; and the state, which is float32, to float32's rounding."""
    narrow, wide = _pair(name, 40, 8)
    optimizers = OPTIMIZERS[kind](narrow, rounding="nearest"), OPTIMIZERS[kind](wide)
    start = _values(narrow)
    assert torch.equal(start, wide.weight.detach())
    for head, optimizer in zip((narrow, wide), optimizers, strict=True):
        train_steps(head, optimizer, range(1))
    expected = wide.weight.detach()
    smallest = expected.abs().amax(1, keepdim=True) * 2.0**-17  # half a unit of those below the normal numbers
    assert bool(((_values(narrow) - expected).abs() <= expected.abs() / 16 * (1 + 1e-5) + smallest).all())
    assert relative_error(expected, start) > 1e-2, "it moved"
    states = [optimizer.state[head.weight] for head, optimizer in zip((narrow, wide), optimizers, strict=True)]
    for key, tensor in states[0].items():
        assert tensor.dtype == torch.float32
        assert relative_error(tensor, states[1][key]) < 1e-4, key


def test_a_resumed_run_takes_the_same_steps() -> None:
    def made() -> tuple[Any, Any]:
        torch.manual_seed(0)
        head = ltloss.CosFaceLoss(30, 8, dtype=FLOAT8)
        return head, OPTIMIZERS["SGD"](head, rounding="stochastic", state_dtype=torch.bfloat16, seed=5)

    head, optimizer = made()
    train_steps(head, optimizer, range(3))
    saved = copy.deepcopy((head.state_dict(), optimizer.state_dict()))
    train_steps(head, optimizer, range(3, 6))
    again, resumed = made()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train_steps(again, resumed, range(3, 6))
    assert torch.equal(head.weight, again.weight)
    assert torch.equal(head.weight_exponent, again.weight_exponent)
    assert torch.equal(copy.deepcopy(head).weight, head.weight)


def test_casts_leave_it_as_it_is() -> None:
    narrow, wide = _pair("ArcFaceLoss")
    before = _values(narrow)
    for cast in (narrow.half, narrow.bfloat16, narrow.double):
        cast()
        assert narrow.weight.dtype == FLOAT8
        assert torch.equal(_values(narrow), before)
    with refused("torch.float32", "float8", "state_dict", error=TypeError):
        wide.to(FLOAT8)
    assert torch.equal(wide.weight, before)
    again = ltloss.ArcFaceLoss(9, 5, dtype=FLOAT8)
    again.load_state_dict(wide.state_dict())
    assert relative_error(_values(again), before) < 1e-3  # an exponent may differ, and numbers below the normal ones


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ("rounding must be chosen", "float8_e4m3fn", "got None")),
        ({"rounding": "kahan"}, ("kahan", "bfloat16", "float8_e4m3fn")),
        ({"rounding": "stochastic", "state_dtype": FLOAT8}, ("state_dtype", "float8_e4m3fn")),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: tuple[str, ...]) -> None:
    head = ltloss.ArcFaceLoss(9, 5, dtype=FLOAT8)
    with refused(*words):
        PrototypeSGD(head, **options)
    assert head.fused_update is None


def test_a_gradient_is_refused_and_not_rounded_away() -> None:
    head = ltloss.ArcFaceLoss(9, 5, dtype=FLOAT8)
    features, _, labels = problem(16, 9, 5, dtype=torch.float32)
    with refused("float8", "ltloss.optim", error=TypeError):
        head(features, labels)
    with torch.no_grad():
        assert head(features, labels).isfinite()


def test_prototypes_of_others_are_read() -> None:
    head = ltloss.ArcFaceLoss(9, 5, dtype=FLOAT8)
    theirs = torch.randn(5, 9) * torch.logspace(-6, 6, 9)
    import_pytorch_metric_learning(head, {"W": theirs})
    assert bool(((_values(head) - theirs.t()).abs() <= theirs.t().abs().amax(1, keepdim=True) / 16).all())
