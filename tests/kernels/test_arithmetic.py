"""The functions of one number that the kernels bring along, against float64."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
import triton
import triton.language as tl
from helpers.kernel_problems import DEVICE
from ltloss_kernels.device import elementary
from ltloss_kernels.device.margin_loss import margin_cosine

from ltloss import margins


@triton.jit
def _apply(x_ptr, y_ptr, z_ptr, count, NAME: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.5)
    y = x
    z = x
    if NAME == "log":
        y = elementary.log(x)
    elif NAME == "log1p":
        y = elementary.log1p(x)
    elif NAME == "exp_of_negative":
        y = elementary.exp_of_negative(x)
    elif NAME == "arccos":
        y = elementary.arccos(x)
    elif NAME == "sine_cosine":
        y, z = elementary.sine_cosine(x)
    else:
        y = elementary.power_of_two_below(x)
    tl.store(y_ptr + at, y, mask=at < count)
    tl.store(z_ptr + at, z, mask=at < count)


def apply(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.float().to(DEVICE)
    y, z = torch.empty_like(x), torch.empty_like(x)
    _apply[(triton.cdiv(x.numel(), 1024),)](x, y, z, x.numel(), NAME=name, BLOCK=1024)
    return y.cpu().double(), z.cpu().double()


def ulps(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error in units in the last place of the exact value."""
    return float(((got - exact).abs() / exact.abs().clamp_min(2.0**-126)).max()) * 2.0**24


CASES: dict[str, tuple[torch.Tensor, Any]] = {
    "log": (torch.logspace(-37, 38, 5000, dtype=torch.float64), torch.log),
    "log1p": (torch.logspace(-37, 0, 5000, dtype=torch.float64), torch.log1p),
    "exp_of_negative": (-torch.logspace(-10, math.log10(87.0), 5000, dtype=torch.float64), torch.exp),
}


@pytest.mark.parametrize("name", CASES)
def test_accuracy(name: str) -> None:
    x = CASES[name][0].float().double()
    got, _ = apply(name, x)
    exact = CASES[name][1](x)
    # log crosses zero, where only the absolute error is bounded by that of its exponent part
    away = exact.abs() > (0.1 if name == "log" else 0.0)
    assert ulps(got[away], exact[away]) <= 8
    assert float((got - exact)[~away].abs().max() if (~away).any() else 0.0) <= 2.0**-23


def test_arccos() -> None:
    near = 1.0 - torch.logspace(-7, -1, 2000, dtype=torch.float64)
    x = torch.cat([torch.linspace(-1, 1, 4001, dtype=torch.float64), near, -near]).float().double()
    got, _ = apply("arccos", x)
    exact = x.acos()
    assert ulps(got[exact > 0], exact[exact > 0]) <= 4
    edges, _ = apply("arccos", torch.tensor([1.0, -1.0, 1.0000001, -1.0000001, 7.0, math.nan]))
    assert edges[:5].tolist() == pytest.approx([0.0, math.pi, 0.0, math.pi, 0.0], abs=1e-7)
    assert edges[5].isnan()


def test_sine_cosine() -> None:
    x = torch.linspace(-1.0, 40.0, 20000, dtype=torch.float64).float().double()
    sine, cosine = apply("sine_cosine", x)
    assert float((sine - x.sin()).abs().max()) <= 2.0**-23
    assert float((cosine - x.cos()).abs().max()) <= 2.0**-23
    assert apply("sine_cosine", torch.tensor([math.nan]))[0].isnan().all()


def test_edges_of_logarithm_and_exponential() -> None:
    assert apply("log", torch.tensor([0.0, math.inf, 1.0]))[0].tolist() == [-math.inf, math.inf, 0.0]
    assert apply("log", torch.tensor([math.nan]))[0].isnan().all()
    assert apply("exp_of_negative", torch.tensor([0.0, -math.inf, -200.0]))[0].tolist() == [1.0, 0.0, 0.0]


def test_power_of_two() -> None:
    x = torch.logspace(-37, 37, 1000, dtype=torch.float64).float().double()
    power, _ = apply("power", x)
    assert ((x * power >= 1.0) & (x * power < 2.0)).all()
    assert (power.log2() % 1 == 0).all()
    assert apply("power", torch.tensor([0.0]))[0].tolist() == [1.0]


@triton.jit
def _margin(cosine_ptr, value_ptr, slope_ptr, multiplier, angular, count, BEYOND_PI: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip # noqa: E501
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cosine = tl.load(cosine_ptr + at, mask=at < count, other=0.5)
    angles = tl.full((BLOCK,), 1.0, tl.float32) * angular
    value, slope = margin_cosine(cosine, multiplier, angles, BEYOND_PI, EXACT)
    tl.store(value_ptr + at, value, mask=at < count)
    tl.store(slope_ptr + at, slope, mask=at < count)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("beyond_pi", get_args(margins.BeyondPi))
@pytest.mark.parametrize(("multiplier", "angular"), [(1.0, 0.0), (1.0, 0.5), (1.0, 2.0), (1.3, -0.4), (4.0, 0.1)])
def test_margin_and_slope(multiplier: float, angular: float, beyond_pi: str, exact: bool) -> None:
    """Against the margins of the chunked path, over the whole range of cosines."""
    # Steps that miss the kinks at multiples of π, where rounding decides which side a slope is taken from.
    cosine = torch.linspace(-1.0, 1.0, 997, dtype=torch.float64).float().to(DEVICE)
    value, slope = torch.empty_like(cosine), torch.empty_like(cosine)
    _margin[(1,)](cosine, value, slope, multiplier, angular, 997, BEYOND_PI=beyond_pi, EXACT=exact, BLOCK=1024)
    leaf = cosine.double().requires_grad_()
    expected = margins.margin_cosine(
        leaf,
        angular_margin=torch.full_like(leaf, angular).detach(),
        angle_multiplier=multiplier,
        beyond_pi=beyond_pi,  # type: ignore[arg-type]
        margin_gradient="exact" if exact else "straight_through",
    )
    (law,) = torch.autograd.grad(expected.sum(), leaf)
    assert float((value - expected.detach()).abs().max()) <= 2e-6
    assert float(((slope - law).abs() / law.abs().clamp_min(1.0)).max()) <= 2e-4 * multiplier
