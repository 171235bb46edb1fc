"""Prototypes in one byte: float8 e4m3, with an exponent of one byte for each class.

Prototype c is 2^e_c · q_c, with q_c in ``weight`` and e_c in ``weight_exponent``. The exponent is the smallest with
which all entries of the row fit, |q| < 448. A power of two rounds nothing, and turns no direction: a cosine needs q
alone. Only what depends on lengths needs e: the update, and other formats.

PyTorch has no arithmetic in float8, so rows are made wide a block at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FLOAT8", "converted", "decoded", "power_of_two", "scaled_down", "widened", "write_rows"]

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
_LOWEST, _HIGHEST = -126, 126  # both 2^e and 2^-e are normal numbers of float32
ELEMENTS = 1 << 20  # made wide at a time


def widened(rows: Tensor, out: Tensor | None = None) -> Tensor:
    """The entries of float8 ``rows`` in float32, without their exponents. On a CPU NaN comes out as 480 > 448."""
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device) if out is None else out
    if rows.device.type != "cpu":
        return out.copy_(rows)
    # PyTorch converts float8 one entry after the other there. As bits of a float16, sign apart, it is 2^-8 of itself.
    halves = rows.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(0xBFFF - (1 << 16))
    return out.copy_(halves.view(torch.float16)).mul_(256.0)


def scaled_down(rows: Tensor) -> tuple[Tensor, Tensor]:
    """e (K,) int8 and ``rows`` (K, D) times 2^-e, in place: the smallest e with max|row| < 448·2^e; 0 for a zero row.

    A row that is not finite becomes NaN.
    """
    least, most = rows.aminmax(dim=1)
    largest = torch.maximum(least.neg_(), most)
    exponent = torch.frexp(largest / LARGEST).exponent.clamp_(_LOWEST, _HIGHEST).to(torch.int8)
    factor = torch.where(largest.isfinite(), power_of_two(-exponent), torch.nan)
    return exponent, rows.mul_(factor[:, None])


def power_of_two(exponent: Tensor) -> Tensor:
    """2^e of int8 e in [-126, 127], in float32, exactly."""
    return exponent.to(torch.int32).add_(127).bitwise_left_shift_(23).view(torch.float32)


def converted(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Entries of any dtype in ``dtype``, those of float8 without their exponents."""
    return (widened(rows) if rows.dtype == FLOAT8 else rows).to(dtype)


def decoded(weight: Tensor, exponent: Tensor) -> Tensor:
    """The prototypes 2^e · q themselves, (K, D) in float32."""
    return widened(weight).mul_(power_of_two(exponent)[:, None])


@torch.no_grad()
def write_rows(weight: Tensor, exponent: Tensor | None, first: int, rows: Tensor) -> None:
    """Prototypes ``[first, first + K)`` of a tensor (C, D) become ``rows`` (K, D), to the nearest that it can hold.

    ``exponent`` (C,) is None unless the weight is float8. A row that is not finite becomes NaN.
    """
    if exponent is None:
        weight[first : first + rows.shape[0]] = rows
        return
    piece = max(1, ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], piece):
        wide = rows[start : start + piece].to(weight.device, torch.float32, copy=True)
        here = slice(first + start, first + start + wide.shape[0])
        exponent[here], scaled = scaled_down(wide)
        weight[here] = scaled.to(FLOAT8)
