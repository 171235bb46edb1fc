"""The precision of float32 products, by either interface of PyTorch and by both at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ltloss_kernels
import pytest
import torch
from helpers.kernel_problems import DEVICE, kernel_problem
from ltloss_kernels.config import operands
from ltloss_kernels.config.precision import float32_products, product_precision

import ltloss
from ltloss import functional
from ltloss.tools import tune_tiles

NEW_INTERFACE = hasattr(torch.backends.cuda.matmul, "fp32_precision")
BACKENDS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if NEW_INTERFACE else ()


def settings() -> list[str]:
    return [backend.fp32_precision for backend in BACKENDS]


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """Whatever a test sets is set back."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def mixed() -> None:
    """TF32 asked for by the new interface: the old question is refused from then on."""
    if not NEW_INTERFACE:
        pytest.skip("this PyTorch has the old interface only")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()


@pytest.mark.parametrize(("asked", "precision"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_the_old_interface(asked: str, precision: str) -> None:
    torch.set_float32_matmul_precision(asked)
    assert product_precision() == precision
    with float32_products("highest"):
        assert product_precision() == "ieee"
    assert torch.get_float32_matmul_precision() == asked


def test_both_interfaces(mixed: None) -> None:
    assert product_precision() == "tf32"
    before = settings()
    for asked, precision in (("highest", "ieee"), ("medium", "tf32")):
        with float32_products(asked):
            assert product_precision() == precision
        assert settings() == before


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_every_operator_runs(backend: Any, mixed: None) -> None:
    given = kernel_problem().leaves()
    before = settings()
    with ltloss.use_backend(backend):
        functional.margin_cross_entropy(*given, angular_margin=0.2).backward()
        functional.min_angle_regularizer(given.prototypes).backward()
        functional.nearest_prototype(given.prototypes, allow_tf32=False)
        functional.top_k(given.features, given.prototypes, 3)
    assert settings() == before


def test_tiles_are_tuned(mixed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = tune_tiles.candidates("forward", 90, torch.float32, "tf32", 4096, 512)[:1]
    monkeypatch.setattr(tune_tiles, "candidates", lambda *_: usual)
    (timing,) = tune_tiles.rank("forward", 8, 12, 8, torch.float32, device="cpu", repeats=1)
    assert not timing.problem


def test_precision_needs_no_triton() -> None:
    script = """
import sys
sys.modules["triton"] = None
from ltloss_kernels.config.precision import product_precision
print(product_precision())
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(ltloss_kernels.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ieee"


@pytest.mark.parametrize("overwrite", [True, False])
def test_products_of_halves_are_added_up_in_float32(overwrite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library refuses a float32 result while it may add in float16, or while TunableOp is on: off around it."""
    left, right = (torch.ones(size, dtype=torch.float16, device=DEVICE) for size in ((4, 8), (8, 4)))
    target = torch.full((4, 4), 2.0, device=DEVICE)
    seen: list[bool] = []

    def product(*args: torch.Tensor, out: torch.Tensor) -> None:
        seen.append(torch.backends.cuda.matmul.allow_fp16_accumulation)
        added = args[0] if not overwrite else 0.0
        out.copy_(left.float() @ right.float() + added)

    if DEVICE == "cpu":  # which has no such product
        name = "mm" if overwrite else "addmm"
        monkeypatch.setattr(torch.ops.aten, name, SimpleNamespace(dtype_out=product))
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        operands.multiply_add_halves(target, left, right, overwrite)
        assert torch.backends.cuda.matmul.allow_fp16_accumulation
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    assert not any(seen)
    assert (target == (8.0 if overwrite else 10.0)).all()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float16)])
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("samples", [20, 600])
def test_operands_of_tf32_are_rounded_where_triton_can(
    samples: int, precision: str, dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off instead, both factors would make each product smaller. Results and half precision are not."""
    if "round_f32_to_tf32" not in {field.name for field in fields(operands.TensorDescriptor)}:
        pytest.skip("this Triton cuts off")
    made = []

    class Written(operands.TensorDescriptor):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append((self.base.dtype, self.round_f32_to_tf32))

    monkeypatch.setattr(operands, "TensorDescriptor", Written)
    features, prototypes, labels = kernel_problem(samples, 40, 16, dtypes=dtypes)
    leaves = features.requires_grad_(), prototypes.requires_grad_()
    with float32_products(precision):
        functional.margin_cross_entropy(*leaves, labels).backward()
    assert made
    rounded = sum(round_it for _, round_it in made)
    assert all(dtype == torch.float32 for dtype, round_it in made if round_it)
    products_in_tf32 = precision == "high" and dtypes[0] == torch.float32
    assert (rounded > 0) == products_in_tf32
    if products_in_tf32:  # two operands of each product; what is written is not
        assert rounded % 2 == 0
        assert len(made) - rounded == rounded // 4
