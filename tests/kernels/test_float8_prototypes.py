"""Prototypes in float8 on the kernels: losses and gradients of features against the float64 law on the same numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.kernel_problems import DEVICE, exact_outcome, kernel_problem, options_on_device
from helpers.refusals import refused
from ltloss_kernels.config import chunking, tile_table
from torch.utils._python_dispatch import TorchDispatchMode

import ltloss
from ltloss import functional
from ltloss.errors import BackendError
from ltloss.float8 import FLOAT8
from ltloss.ops import _dispatch
from ltloss.optim import PrototypeSGD
from ltloss.testing import FAMILY, Problem, relative_error, watching

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# Of the loss and of dX: float32's, or a rounding of each gradient entry, and of each entry of dZ.
TOLERANCES = {F32: 5e-6, F16: 2.0**-9, BF16: 2.0**-7}


def problem(n: int = 37, c: int = 70, d: int = 19, dtype: torch.dtype = F32) -> Problem:
    """Prototypes of the whole range: short ones of few bits, a zero, and the largest number."""
    given = kernel_problem(n, c, d, dtypes=(dtype, F32))
    size = torch.logspace(-8, 8, c, base=2, device=DEVICE)[:, None]
    prototypes = (given.prototypes * size).clamp(-448.0, 448.0)
    prototypes[c // 2] = 0.0
    return given._replace(prototypes=prototypes.to(FLOAT8))


def check(given: Problem, **options: Any) -> None:
    features = given.features.clone().requires_grad_()
    loss = functional.margin_cross_entropy(features, given.prototypes, given.labels, **options_on_device(options))
    loss.backward()
    exact = exact_outcome(given, **options)
    tolerance = TOLERANCES[given.features.dtype]
    assert loss.dtype == F32
    assert relative_error(loss.detach().cpu(), exact.loss) <= tolerance
    assert relative_error(features.grad.cpu(), exact.features) <= tolerance


@pytest.mark.parametrize("name", ["arcface", "everything", "feature_length_smoothed"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_dtype_of_the_features(dtype: torch.dtype, name: str) -> None:
    check(problem(dtype=dtype), **FAMILY[name](70))


@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 2, 5), (17, 33, 16), (40, 31, 32), (5, 64, 130)])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_every_shape(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(problem(*shape, dtype=dtype), angular_margin=0.3, reduction="sum")


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("engine", [False, True])
def test_several_slabs(many: bool, engine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its copy, with the copy engine and without; few samples and many."""
    monkeypatch.setattr(chunking, "_LEAST_CLASSES", 16)
    monkeypatch.setattr(tile_table, "has_copy_engine", lambda arch: engine)
    if many:
        monkeypatch.setattr(tile_table, "FEW_SAMPLES", 0)
    with ltloss.use_workspace(1):
        check(problem(dtype=F16), angular_margin=0.3)


def test_any_strides() -> None:
    wide = problem(37, 140, 60)
    labels = torch.where(wide.labels < 0, wide.labels, wide.labels // 2)
    check(Problem(wide.features[:, 1:41:2], wide.prototypes[::2, 2:42:2], labels), angular_margin=0.3)
    check(Problem(wide.features[:, :20], wide.prototypes[:70, :20], labels), angular_margin=0.3)


class WideMemory(TorchDispatchMode):
    """The sizes of all memory taken for numbers of two bytes and more."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "empty" in str(func) and result.dtype.itemsize > 1:
            self.sizes.append(result.numel())
        return result


def test_a_step_takes_memory_for_a_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "_COPY_BYTES", 1 << 16)  # of the forward
    classes, width = 4000, 16
    head = ltloss.ArcFaceLoss(classes, width, dtype=FLOAT8).to(DEVICE)
    optimizer = PrototypeSGD(head, lr=0.1, rounding="stochastic")
    features = torch.randn(8, width, device=DEVICE, requires_grad=True)
    with watching(WideMemory()) as seen, ltloss.use_workspace(1 << 16):
        head(features, torch.arange(8, device=DEVICE)).backward()
        optimizer.step()
    assert 1024 * width <= max(seen.sizes) < classes * width // 2


@pytest.mark.parametrize(("capability", "served"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_a_gpu_without_float8_computes_by_pytorch(capability: tuple[int, int], served: bool) -> None:
    features = mock.Mock(spec=torch.Tensor, dtype=F32, shape=(3, 8), device=torch.device("cuda", 0))
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=properties):
        for dtype in (F32, FLOAT8):
            prototypes = torch.empty(4, 8, dtype=dtype, device="meta")
            chosen = "triton" if served or dtype == F32 else "torch"
            with ltloss.use_backend("auto"):
                assert _dispatch.choose_backend(features, prototypes) == chosen
        if not served:
            with refused("'triton'", "8.9", "float8", "'torch'", error=BackendError):
                _dispatch.choose_backend(features, prototypes)
