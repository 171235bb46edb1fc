"""Never worse than PyTorch: the error against float64, compared with that of the dense formula in float32.

Both get the same, already rounded inputs, so the rounding of the inputs is no part of either error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ltloss import reference
from ltloss.functional import cosine_logsumexp, nearest_prototype, top_k
from ltloss.testing import FAMILY, Outcome, Problem, outcome, problem, relative_error, watching

pytestmark = pytest.mark.slow

N, C, D = 24, 150, 32
SEEDS = range(3)

# Both implementations round the same number of times but sum in another order, so of two equally good ones either may
# be the luckier: errors are 2-norms over a whole tensor and three draws, and beside the factor 4 units in the last
# place of the tensor's norm are granted.
FACTOR, FLOOR = 1.5, 4 * 2.0**-24

# At cos = ±1 a float32 cosine tells angles apart only to √(2·2^-24), and z = s·cos(θ + m) is as uncertain as s·sin m
# times that, whoever computes it: whether a cosine comes out as 1 or as 1 − 2^-24 is luck.
ANGLE_AT_ONE = {"equal_to_target_prototype": 2.0**-11.5, "opposite_to_target_prototype": 2.0**-11.5}


def _random(seed: int) -> Problem:
    return problem(N, C, D, seed=seed)


def _trained(seed: int) -> Problem:
    """Peaked: features close to their target's prototype, every sixth sample in the place of another class."""
    given = problem(N, C, D, seed=seed)
    features = 3.0 * given.prototypes[given.labels.clamp_min(0)] + 0.15 * given.features
    features[::6] = 3.0 * given.prototypes[: len(features[::6])]
    return given._replace(features=features)


def _equal_to_target_prototype(seed: int) -> Problem:
    given = problem(N, C, D, seed=seed)
    return given._replace(features=given.prototypes[given.labels.clamp_min(0)].clone())


def _opposite_to_target_prototype(seed: int) -> Problem:
    given = _equal_to_target_prototype(seed)
    return given._replace(features=-2.0 * given.features)


def _duplicate_prototypes(seed: int) -> Problem:
    given = problem(N, C, D, seed=seed)
    return given._replace(prototypes=given.prototypes[torch.arange(C) % 10].clone())


def _all_features_equal(seed: int) -> Problem:
    given = problem(N, C, D, seed=seed)
    return given._replace(features=given.prototypes[:1].expand(N, D).clone())


INPUTS: dict[str, Callable[[int], Problem]] = {
    "random": _random,
    "trained": _trained,
    "equal_to_target_prototype": _equal_to_target_prototype,
    "opposite_to_target_prototype": _opposite_to_target_prototype,
    "duplicate_prototypes": _duplicate_prototypes,
    "all_features_equal": _all_features_equal,
}

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bf16_features": (torch.bfloat16, torch.float32),
    "bf16_prototypes": (torch.float32, torch.bfloat16),
    "fp16_features": (torch.float16, torch.float32),
}


def rounded(given: Problem, dtypes: tuple[torch.dtype, torch.dtype]) -> Problem:
    return Problem(given.features.to(dtypes[0]), given.prototypes.to(dtypes[1]), given.labels)


def widened(given: Problem) -> Problem:
    return Problem(given.features.double(), given.prototypes.double(), given.labels)


def errors(results: list[Outcome], exact: list[Outcome]) -> list[float]:
    """‖result − exact‖/‖exact‖ over all draws, for the losses and both gradients."""
    found = []
    for one, true in zip(zip(*results, strict=True), zip(*exact, strict=True), strict=True):
        ours, law = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (one, true))
        found.append(float((ours - law).norm() / law.norm()))
    return found


def check(draws: list[Problem], options: dict[str, Any], *, floor: float = FLOOR) -> None:
    """Ours against the dense formula in the same dtype, both measured against float64 on the same numbers."""
    options = {**options, "reduction": "none"}
    upstream = torch.linspace(0.5, 1.5, N)
    exact = [outcome(widened(d), upstream.double(), loss=reference.margin_cross_entropy, **options) for d in draws]
    dense = [outcome(d, upstream, loss=reference.margin_cross_entropy, **options) for d in draws]
    ours = [outcome(d, upstream, **options) for d in draws]
    bounds = [FACTOR * error + floor for error in errors(dense, exact)]
    for name, error, bound in zip(Outcome._fields, errors(ours, exact), bounds, strict=True):
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", INPUTS)
def test_every_kind_of_input_in_every_dtype(inputs: str, dtype: str) -> None:
    draws = [rounded(INPUTS[inputs](seed), DTYPES[dtype]) for seed in SEEDS]
    check(draws, {"angular_margin": 0.4}, floor=FLOOR + 30.0 * math.sin(0.4) * ANGLE_AT_ONE.get(inputs, 0.0))


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("inputs", ["random", "trained"])
def test_every_loss_in_float32(name: str, inputs: str) -> None:
    check([rounded(INPUTS[inputs](seed), DTYPES["float32"]) for seed in SEEDS], FAMILY[name](C))


@pytest.mark.parametrize("name", ["cosface", "everything", "feature_length"])
def test_some_losses_in_bfloat16(name: str) -> None:
    check([rounded(_trained(seed), DTYPES["bfloat16"]) for seed in SEEDS], FAMILY[name](C))


@pytest.mark.parametrize("scale", [1.0, 16.0, 64.0, 512.0])
@pytest.mark.parametrize("inputs", ["random", "trained", "opposite_to_target_prototype"])
def test_every_scale(scale: float, inputs: str) -> None:
    draws = [rounded(INPUTS[inputs](seed), DTYPES["float32"]) for seed in SEEDS]
    check(draws, {"cosine_margin": 0.2, "scale": scale})


@pytest.mark.parametrize("length", [1e-3, 1.0, 30.0])
def test_features_that_keep_their_length(length: float) -> None:
    draws = [problem(N, C, D, seed=seed) for seed in SEEDS]
    draws = [rounded(d._replace(features=d.features * length), DTYPES["float32"]) for d in draws]
    check(draws, {"normalize_features": False, "angular_margin": 0.2, "scale": 1.0})


@pytest.mark.parametrize("factors", [(1e-25, 1.0), (1e20, 1.0), (1.0, 1e-25), (1.0, 1e20), (1e-25, 1e20)])
def test_lengths_whose_squares_leave_float32(factors: tuple[float, float]) -> None:
    """Dense float32 fails here, its squares are 0 or infinite; what it reaches at ordinary length is the measure."""
    ordinary = [rounded(_random(seed), DTYPES["float32"]) for seed in SEEDS]
    extreme = [Problem(d.features * factors[0], d.prototypes * factors[1], d.labels) for d in ordinary]

    def error(draws: list[Problem], function: Any) -> list[float]:
        exact = [outcome(widened(d), loss=reference.margin_cross_entropy, angular_margin=0.4) for d in draws]
        return errors([outcome(d, loss=function, angular_margin=0.4) for d in draws], exact)

    for ours, dense in zip(error(extreme, None), error(ordinary, reference.margin_cross_entropy), strict=True):
        assert ours <= FACTOR * dense + FLOOR


def test_mixed_lengths_in_one_matrix() -> None:
    given = rounded(_random(0), DTYPES["float32"])
    factors = 10.0 ** torch.linspace(-25, 20, C)
    wild = given._replace(prototypes=given.prototypes * factors[:, None])
    plain, ours = outcome(given), outcome(wild)
    assert relative_error(ours.loss, plain.loss) <= 2 * FLOOR
    assert relative_error(ours.features, plain.features) <= 8 * FLOOR
    assert relative_error(ours.prototypes * factors[:, None], plain.prototypes) <= 8 * FLOOR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_search(dtype: torch.dtype) -> None:
    given = _random(0)
    prototypes, features = given.prototypes.to(dtype), given.features.to(dtype)
    for ours, exact in (
        (nearest_prototype(prototypes), reference.nearest_prototype(prototypes.double())),
        (top_k(features, prototypes, 5), reference.top_k(features.double(), prototypes.double(), 5)),
    ):
        assert relative_error(ours.cosine, exact.cosine) <= 1e-6  # float32 sums of 32 products below 1
        assert torch.equal(ours.index, exact.index)


def test_peaked_gradient_is_no_worse_row_by_row() -> None:
    """A confident sample's small gradient counts as much as a large one: errors relative to each row."""
    given = rounded(_trained(0), DTYPES["float32"])
    options = {"angular_margin": 0.3, "reduction": "sum"}
    exact = outcome(widened(given), loss=reference.margin_cross_entropy, **options).features

    def worst(gradient: Tensor) -> Tensor:
        error = (gradient.double() - exact).norm(dim=1)
        return error / exact.norm(dim=1).clamp_min(1e-30)

    dense = worst(outcome(given, loss=reference.margin_cross_entropy, **options).features)
    ours = worst(outcome(given, **options).features)
    # Of single rows either may be the luckier one; the median and the worst row may not be worse than dense float32.
    assert float(ours.median()) <= FACTOR * float(dense.median()) + FLOOR
    assert float(ours.max()) <= FACTOR * float(dense.max()) + FLOOR


class _Multiplied(TorchDispatchMode):
    """Keeps a copy of every (N, C) matrix, or its transpose, that a product reads."""

    def __init__(self) -> None:
        super().__init__()
        self.tiles: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.tiles += [each.clone() for each in args[-2:] if sorted(each.shape) == [N, C]]
        return func(*args, **(kwargs or {}))


def test_gradient_tiles_hold_no_denormals() -> None:
    """Denormals slow a matrix product tenfold and more: a probability is a normal number or zero, at any scale."""
    with watching(_Multiplied()) as seen:
        outcome(rounded(_trained(0), DTYPES["float32"]), scale=100.0)
    assert len(seen.tiles) == 2  # for the features and for the prototypes
    size = torch.cat([tile.flatten() for tile in seen.tiles]).abs()
    assert bool((size[size > 0] >= 1e-36).all())  # 100 above the smallest normal number, for products to be normal too
    assert 0.01 < float((size == 0).float().mean()) < 0.99  # the problem has probabilities on both sides of the bound


def test_rows_longer_than_float32_can_say_keep_their_direction() -> None:
    """Finite entries whose norm, 6e38, is not: no direction 0, and no infinity."""
    prototypes = torch.tensor([[3e38, 3e38, 3e38, 3e38], [1.0, -1.0, 0.0, 0.0]])
    features = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    other, own = cosine_logsumexp(features, prototypes, torch.tensor([0]), scale=2.0)
    assert own.item() == pytest.approx(2.0, rel=1e-6)
    assert other.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_reference_and_logits_keep_the_direction_of_extreme_rows(factor: float) -> None:
    """Squares of 1e±25 leave float32; directions do not depend on lengths."""
    features, prototypes = torch.randn(5, 6), torch.randn(7, 6)
    expected = reference.cosines(features, prototypes)
    assert relative_error(reference.cosines(features * factor, prototypes * factor), expected) <= 1e-6


def test_logits_are_float32_under_autocast() -> None:
    """What logits say best is what predict finds, also where products would drop to half precision."""
    features, prototypes = torch.randn(200, 16), torch.randn(500, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = reference.cosines(features, prototypes)
    assert logits.dtype == torch.float32
    assert torch.equal(logits.argmax(1), top_k(features, prototypes, 1).index[:, 0])
