"""How float32 products are formed: PyTorch's settings, read and set. Needs no Triton.

PyTorch has two interfaces: ``torch.set_float32_matmul_precision``, and the newer ``fp32_precision`` of each backend.
``torch.get_float32_matmul_precision`` raises where the two were mixed; ``fp32_precision`` can always be read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["float32_products", "product_precision"]

# What torch.set_float32_matmul_precision sets for CUDA and for the CPU's library.
_SETTINGS = {"highest": ("ieee", "ieee"), "high": ("tf32", "tf32"), "medium": ("tf32", "bf16")}


@functools.cache
def _backends() -> tuple[Any, ...]:
    """The backends that have a ``fp32_precision`` for matrix products; none before PyTorch 2.9."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return backends if all(hasattr(backend, "fp32_precision") for backend in backends) else ()


def product_precision() -> str:
    """Precision of float32 products on a GPU: "tf32" where PyTorch may round factors to 10 bits, "ieee" otherwise.

    Example:
        >>> from ltloss_kernels.config.precision import product_precision
        >>> product_precision()
        'ieee'
    """
    if backends := _backends():
        return "tf32" if backends[0].fp32_precision == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Within the block, compute float32 products as ``torch.set_float32_matmul_precision(precision)`` asks.

    Args:
        precision: "highest", "high" or "medium".

    Example:
        >>> with float32_products("high"):
        ...     product_precision()
        'tf32'
    """
    backends = _backends()
    before = [backend.fp32_precision for backend in backends]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # the two were mixed: the old interface could be set, but not restored
        legacy = None
    if legacy is not None:
        torch.set_float32_matmul_precision(precision)
    else:
        _set(backends, _SETTINGS[precision])
    try:
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        _set(backends, before)


def _set(backends: tuple[Any, ...], values: Any) -> None:
    for backend, value in zip(backends, values, strict=True):
        if backend.fp32_precision != value:
            backend.fp32_precision = value
