"""The operands of the matrix products: the caller's rows where they can be read in place, copies of them otherwise.

The copy engine (TMA) reads rows that are contiguous and start at multiples of 16 bytes. Rows of another layout or dtype
are copied: features whole, prototypes slab by slab. Without the engine the kernels read 16 bytes at a time, also where
a row ends in the middle of them. The kernels that write copies therefore fill the rest of a row with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ltloss_kernels.config import tile_table as tiles
from ltloss_kernels.config.chunking import ceil_div

__all__ = [
    "beside_each_other",
    "block_source",
    "multiply_add",
    "multiply_add_halves",
    "multiply_add_in_parts",
    "padded_matrix",
    "part",
    "product_dtype",
    "readable_in_place",
    "vector",
]

_Given = TypeVar("_Given", Tensor, Tensor | None)
_HALVES = (torch.float16, torch.bfloat16)
# From Triton 3.7 on.
_TO_TF32 = {field.name: True for field in fields(TensorDescriptor) if field.name == "round_f32_to_tf32"}
_FLOAT8 = torch.float8_e4m3fn  # of prototypes; times a power of two its numbers are exact in every other dtype


def product_dtype(features: torch.dtype, prototypes: torch.dtype) -> torch.dtype:
    """The dtype of the matrix products.

    Features in half precision decide it where the prototypes have the same dtype, float32 or float8. Products among
    float8 prototypes run in float16, which holds their scaled copies exactly. All others run in float32.
    """
    if features == prototypes == _FLOAT8:
        return torch.float16
    return features if features in _HALVES and prototypes in (features, torch.float32, _FLOAT8) else torch.float32


def readable_in_place(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels can read the rows of ``matrix`` (K, D) as they are, for a product in ``dtype``; never float8."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    return (
        matrix.dtype == dtype != _FLOAT8
        and matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and row_bytes % 16 == 0
        and row_bytes < 1 << 40
        and matrix.data_ptr() % 16 == 0
        and (
            matrix.shape[1] * matrix.element_size() % 16 == 0
            or tiles.has_copy_engine(tiles.architecture(matrix.device))  # which reads nothing between rows
        )
    )


def padded_matrix(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised (rows, width) matrix that is readable in place."""
    unit = 16 // dtype.itemsize
    padded = ceil_div(width, unit) * unit
    matrix = torch.empty(rows, padded, dtype=dtype, device=device)
    return matrix if padded == width else matrix[:, :width]


def part(values: _Given, rows: slice, dim: int = 0) -> _Given:
    """The slice ``rows`` of an axis. All of it, or None, is returned as given: a view costs the host half a launch."""
    if values is None or rows.stop - rows.start == values.shape[dim]:
        return values
    return values.narrow(dim, rows.start, rows.stop - rows.start)


def beside_each_other(matrix: Tensor, rows: int) -> Tensor:
    """A view of a matrix (C·K, D) in which the K = ``rows`` rows of a class are one row: (C, (K - 1)·stride + D)."""
    if rows == 1:
        return matrix
    (count, width), stride = matrix.shape, matrix.stride(0)
    return matrix.as_strided((count // rows, (rows - 1) * stride + width), (rows * stride, 1))


def block_source(
    matrix: Tensor, rows: int, columns: int, described: bool, tf32: bool = False
) -> TensorDescriptor | Tensor:
    """``matrix`` as the kernels take it: a descriptor with blocks of rows by columns for the copy engine, or itself.

    ``tf32``: for a product in TF32 the copy engine rounds the entries, where Triton can ask for that. The product would
    cut them off instead, which makes every logit smaller. Searches let it: both their passes must see the same entries.
    """
    if not described:
        return matrix
    options = _TO_TF32 if tf32 else {}
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], **options)


def vector(values: Tensor | None) -> Tensor | None:
    """A vector as the kernels read it: float32 and contiguous. None stays None."""
    return None if values is None else values.to(torch.float32).contiguous()


@contextmanager
def _wide_sums() -> Iterator[None]:
    """Within the block, library products of half-precision factors accumulate in float32.

    PyTorch refuses such products with a float32 result under ``allow_fp16_accumulation``, which asks for the contrary,
    and under TunableOp, which does not know them. Both are off within the block.
    """
    matmul, tunable = torch.backends.cuda.matmul, torch.cuda.tunable
    narrow = getattr(matmul, "allow_fp16_accumulation", False)  # from PyTorch 2.7 on
    tuned = torch.version.cuda is not None and tunable.is_enabled()
    if narrow:
        matmul.allow_fp16_accumulation = False
    if tuned:
        tunable.enable(False)
    try:
        yield
    finally:
        if narrow:
            matmul.allow_fp16_accumulation = True
        if tuned:
            tunable.enable(True)


def multiply_add(target: Tensor, left: Tensor, right: Tensor, *, overwrite: bool) -> None:
    """target += left @ right, or = with ``overwrite``, by the library; float32 target, factors of any dtype."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=target) if overwrite else target.addmm_(left, right)
    elif left.device.type != "cuda":  # the interpreter: a CPU has no product with a wider result
        multiply_add(target, left.float(), right.float(), overwrite=overwrite)
    else:
        multiply_add_halves(target, left, right, overwrite)


def multiply_add_in_parts(target: Tensor, left: Tensor, right: Tensor, parts: int, *, overwrite: bool) -> None:
    """:func:`multiply_add` as ``parts`` products over parts of K, added in order. A small target gets more tiles so."""
    depth = left.shape[1] // parts
    whole = slice(0, parts * depth)
    factors = (
        torch.unflatten(part(left, whole, 1), 1, (parts, depth)).transpose(0, 1),
        torch.unflatten(part(right, whole), 0, (parts, depth)),
    )
    if left.device.type == "cuda" and left.dtype != torch.float32:
        with _wide_sums():
            products = torch.ops.aten.bmm.dtype(*factors, torch.float32)
    else:
        products = torch.bmm(*(factor.float() for factor in factors))
    torch.sum(products, 0, out=target) if overwrite else target.add_(products.sum(0))
    if whole.stop < left.shape[1]:
        rest = slice(whole.stop, left.shape[1])
        multiply_add(target, part(left, rest, 1), part(right, rest), overwrite=False)


def multiply_add_halves(target: Tensor, left: Tensor, right: Tensor, overwrite: bool) -> None:
    """:func:`multiply_add` for half-precision factors on a GPU, accumulated in float32 whatever is set."""
    with _wide_sums():
        if overwrite:
            torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=target)
        else:
            torch.ops.aten.addmm.dtype_out(target, left, right, torch.float32, out=target)
