"""Two bytes an entry: nothing is lost on average, and the same bits whatever the order of the work."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import ltloss
from ltloss.chunked import logsumexp as chunked
from ltloss.chunked.tiles import Blocks
from ltloss.distributed import parallelize
from ltloss.float8 import FLOAT8
from ltloss.optim import PrototypeAdagrad, PrototypeAdamW, PrototypeSGD
from ltloss.optim.rounding import philox, random_bits, round_stochastically
from ltloss.testing import problem, relative_error

BFLOAT16_UNIT = 2.0**-8  # of a number in [1, 2): half of it is the largest error of rounding to the nearest


@pytest.mark.parametrize("key", [(0, 0), (7, 3), (2**64 - 1, 2**63)])
def test_the_generator_is_that_of_numpy(key: tuple[int, int]) -> None:
    theirs = np.random.Philox(key=np.array(key, np.uint64), counter=np.array([40, 0, 5, 0], np.uint64))
    found = philox(np.arange(41, 48), key, stream=5)
    assert (found.ravel() == theirs.random_raw(28)).all()


@pytest.mark.parametrize("width", [1, 15, 16, 17, 100])
def test_the_bits_of_a_class_do_not_depend_on_its_neighbours(width: int) -> None:
    whole = random_bits(range(1000), width, seed=1, step=2, stream=0)
    assert torch.equal(random_bits(range(300, 310), width, 1, 2, 0), whole[300:310])
    some = np.array([999, 4, 7, 0])
    assert torch.equal(random_bits(some, width, 1, 2, 0), whole[some])
    for seed, step, stream in ((2, 2, 0), (1, 3, 0), (1, 2, 1)):
        assert not torch.equal(random_bits(range(1000), width, seed, step, stream), whole)


def test_the_bits_are_uniform() -> None:
    bits = random_bits(range(4096), 64, seed=0, step=1, stream=0).double()
    count = bits.numel()
    assert abs(float(bits.mean()) + 0.5) < 4 * 65536 / 12**0.5 / count**0.5
    histogram = torch.histc(bits, 64, -32768, 32768)
    chi_squared = float(((histogram - count / 64) ** 2 / (count / 64)).sum())
    assert 63 - 4 * 126**0.5 < chi_squared < 63 + 4 * 126**0.5
    assert abs(float(torch.corrcoef(bits.T[:2])[0, 1])) < 4 / 64  # of two columns over 4096 classes


@pytest.mark.parametrize("value", [1.0 + 0.3 / 128, -1.0 - 0.9 / 128, 3e-39, -2.7e38, 0.0, 1.5])
def test_the_mean_of_every_rounding_is_the_value(value: float) -> None:
    """All 2^16 random numbers, once each: not an estimate."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    exact = torch.full((1 << 16,), value)
    rounded = torch.empty(1 << 16, dtype=torch.bfloat16)
    round_stochastically(exact.clone(), every, rounded)
    assert float(rounded.double().mean()) == pytest.approx(float(exact[0].double()), rel=1e-12)
    assert len(rounded.unique()) <= 2


def _train(module: Any, optimizer: Any, steps: int) -> Tensor:
    for seed in range(steps):
        features, _, labels = problem(16, *module.weight.shape, seed=seed, dtype=torch.float32)
        module(features, labels).backward()
        optimizer.step()
    return module.weight.detach().double()


def _narrow(module: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    made = type(module)(*module.weight.shape, dtype=dtype)
    made.load_state_dict(module.state_dict())
    return made


KINDS = {
    "SGD": (PrototypeSGD, {"lr": 4e-3, "momentum": 0.9}),
    "AdamW": (PrototypeAdamW, {"lr": 1e-4}),
    "Adagrad": (PrototypeAdagrad, {"lr": 3e-4}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_small_steps_are_kept_on_average(kind: str) -> None:
    """Steps far below a unit of the last place: to the nearest many are lost, else the path is that of float32.

    Each stochastic write has an error of at most a unit u of its entry and the mean 0: after 30 steps and over 51200
    entries the mean distance along the path stays within 4·u·√(30/51200) of float32's.
    """
    make, options = KINDS[kind]
    torch.manual_seed(0)
    start = ltloss.CosFaceLoss(400, 128)
    start.weight.data = start.weight.data.bfloat16().float()
    origin = start.weight.detach().double()
    wide = copy.deepcopy(start)
    path = _train(wide, make(wide, **options), 30) - origin
    along, unit = {}, float(origin.abs().mean()) * BFLOAT16_UNIT
    allowed = 4 * unit * (30 / 5000) ** 0.5 / float(path.square().mean().sqrt())
    for rounding in ("stochastic", "kahan", "nearest"):
        module = _narrow(start)
        optimizer = make(module, **options, rounding=rounding)
        moved = _train(module, optimizer, 30) - origin
        if rounding == "kahan":
            moved += optimizer.state[module.weight]["compensation"]
        along[rounding] = float((moved * path).sum() / (path * path).sum())
    assert allowed < 0.15, "the test would say little"
    assert abs(along["stochastic"] - 1) < allowed
    assert abs(along["kahan"] - 1) < 0.01
    assert along["nearest"] < 1 - allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_for_any_number_of_slabs(kind: str, dtype: torch.dtype) -> None:
    make, options = KINDS[kind]
    torch.manual_seed(0)
    start = ltloss.CosFaceLoss(70, 20)
    found = []
    for classes in (70, 64, 9):
        module = _narrow(start, dtype)
        optimizer = make(module, **options, rounding="stochastic")
        blocks = Blocks(16, classes)
        with mock.patch.object(chunked, "block_sizes", lambda *_, blocks=blocks: blocks):
            found.append(_train(module, optimizer, 1))
    # The gradient itself does not depend on the slab: each class has its own sums.
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("make", [PrototypeSGD, PrototypeAdamW])
def test_state_in_two_bytes(make: Any) -> None:
    options = {"lr": 0.05, "momentum": 0.9} if make is PrototypeSGD else {"lr": 0.01}
    torch.manual_seed(0)
    narrow = ltloss.CosFaceLoss(40, 16)
    wide = copy.deepcopy(narrow)
    start = narrow.weight.detach().double()
    optimizer = make(narrow, **options, state_dtype=torch.bfloat16)
    state = optimizer.state[narrow.weight]
    assert {t.dtype for name, t in state.items() if name != "step"} == {torch.bfloat16}
    moved = [_train(module, one, 20) - start for module, one in ((narrow, optimizer), (wide, make(wide, **options)))]
    assert relative_error(*moved) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8])
def test_a_sample_draws_the_bits_of_its_classes(dtype: torch.dtype) -> None:
    """All classes in the sample: the same result as without sampling, bit for bit."""
    torch.manual_seed(0)
    start = _narrow(ltloss.CosFaceLoss(30, 20), dtype)
    results = []
    for rate in (1.0, 0.999):
        module = parallelize(copy.deepcopy(start), None, sample_rate=rate, unbiased=False)
        results.append(_train(module, PrototypeSGD(module, lr=0.1, momentum=0.9, rounding="stochastic"), 3))
    assert torch.equal(*results)
