"""The kernels are never worse than plain PyTorch in the same dtype, both measured against float64.

"Plain PyTorch" is what one writes without this package: ``F.normalize`` and ``F.linear`` in the dtype of the features
(under autocast the prototypes are cast to it), the margin and the cross-entropy in float32.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.kernel_problems import DEVICE
from ltloss_kernels.config import tile_table as tiles
from torch import Tensor
from torch.nn import functional as F

from ltloss import reference
from ltloss.testing import FAMILY, Outcome, Problem, outcome
from tests.ops.test_accuracy import ANGLE_AT_ONE, FACTOR, FLOOR, INPUTS, SEEDS, C, N, errors, rounded, widened

pytestmark = pytest.mark.slow

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def middling_tiles(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that the interpreter is quick with; the boundaries are tested elsewhere."""
    if DEVICE == "cpu":
        for name in ("forward_tile", "gradient_tile"):
            monkeypatch.setattr(tiles, name, lambda *_: tiles.Tile(32, 128, 32, 4, 2))


def _plain(features: Tensor, prototypes: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The formula on logits from one library product in the features' dtype."""
    dtype = features.dtype
    cosine = F.linear(F.normalize(features), F.normalize(prototypes.to(dtype))).float()
    counted = labels >= 0
    y = torch.where(counted, labels, 0)
    own = cosine.gather(1, y[:, None])[:, 0]
    angle = own.clamp(-1 + 1e-7, 1 - 1e-7).acos()
    with_margin = (angle + options["angular_margin"]).cos() if options["angular_margin"] else own
    logits = 30.0 * cosine.scatter(1, y[:, None], with_margin[:, None])
    return F.cross_entropy(logits, labels, reduction="none")


def _on_device(given: Problem) -> Problem:
    return Problem(*(tensor.to(DEVICE) for tensor in given))


def _check(draws: list[Problem], options: dict[str, Any], plain: Any, floor: float = FLOOR) -> None:
    options = {**options, "reduction": "none"}
    upstream = torch.linspace(0.5, 1.5, N)
    exact = [outcome(widened(d), upstream.double(), loss=reference.margin_cross_entropy, **options) for d in draws]
    dense = [outcome(d, upstream, loss=plain, **options) for d in draws]
    on_device = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    ours = [Outcome(*(t.cpu() for t in outcome(_on_device(d), upstream.to(DEVICE), **on_device))) for d in draws]
    bounds = [FACTOR * error + floor for error in errors(dense, exact)]
    for name, error, bound in zip(Outcome._fields, errors(ours, exact), bounds, strict=True):
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


def _draws(inputs: str, dtypes: tuple[torch.dtype, torch.dtype]) -> list[Problem]:
    return [rounded(INPUTS[inputs](seed), dtypes) for seed in SEEDS]


@pytest.mark.parametrize("dtypes", [(F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)])
@pytest.mark.parametrize("inputs", INPUTS)
def test_half_precision(inputs: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    # Opposite to its prototype the exact angle is π, where plain PyTorch's clamp and ours read different luck.
    margin = 0.0 if inputs in ANGLE_AT_ONE else 0.4
    labels = [d._replace(labels=d.labels.clamp_min(-100)) for d in _draws(inputs, dtypes)]
    _check(labels, {"angular_margin": margin}, _plain)


@pytest.fixture
def bfloat16_roundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU rounds to bfloat16 is rounded here too.

    The interpreter gets bfloat16 numbers in float32, since it multiplies bfloat16 wrongly. The unit features and the
    slab of dZ are the tensors that the kernels themselves write in the dtype of the product.
    """
    if DEVICE != "cpu":
        return
    from ltloss_kernels.backward_pass import BackwardPass
    from ltloss_kernels.cosine_logsumexp import ForwardPass

    forward, begin = ForwardPass.launch_samples, BackwardPass.__init__
    prepare, tiles_of_slab = BackwardPass.launch_samples, BackwardPass.launch_tiles

    def round_(matrix: Tensor) -> None:
        assert matrix.dtype == F32
        matrix.copy_(matrix.bfloat16())

    def rounded_forward(self: Any, chunk: Any) -> None:
        forward(self, chunk)
        round_(chunk.copy)

    def folding(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.fold = True

    def rounded_samples(self: Any) -> None:
        prepare(self)
        round_(self.unit)

    def rounded_slab(self: Any, rows: slice, slab: Any) -> list[Tensor]:
        parts: list[Tensor] = tiles_of_slab(self, rows, slab)
        for part in parts:
            round_(part)
        return parts

    monkeypatch.setattr(ForwardPass, "launch_samples", rounded_forward)
    monkeypatch.setattr(BackwardPass, "__init__", folding)
    monkeypatch.setattr(BackwardPass, "launch_samples", rounded_samples)
    monkeypatch.setattr(BackwardPass, "launch_tiles", rounded_slab)


@pytest.mark.parametrize("inputs", INPUTS)
def test_bfloat16_with_its_roundings(inputs: str, bfloat16_roundings: None) -> None:
    margin = 0.0 if inputs in ANGLE_AT_ONE else 0.4
    labels = [d._replace(labels=d.labels.clamp_min(-100)) for d in _draws(inputs, (BF16, BF16))]
    _check(labels, {"angular_margin": margin}, _plain)


@pytest.mark.parametrize("inputs", INPUTS)
def test_float32(inputs: str) -> None:
    floor = FLOOR + 30.0 * math.sin(0.4) * ANGLE_AT_ONE.get(inputs, 0.0)
    _check(_draws(inputs, (F32, F32)), {"angular_margin": 0.4}, reference.margin_cross_entropy, floor)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("inputs", ["random", "trained"])
def test_every_loss_in_float32(name: str, inputs: str) -> None:
    _check(_draws(inputs, (F32, F32)), FAMILY[name](C), reference.margin_cross_entropy)


@pytest.mark.parametrize("scale", [1.0, 64.0, 512.0])
@pytest.mark.parametrize("inputs", ["random", "trained", "opposite_to_target_prototype"])
def test_every_scale(scale: float, inputs: str) -> None:
    _check(_draws(inputs, (F32, F32)), {"cosine_margin": 0.2, "scale": scale}, reference.margin_cross_entropy)
