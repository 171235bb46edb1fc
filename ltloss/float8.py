"""Prototypes in one byte per entry: float8 e4m3, with a one-byte exponent per class.

Prototype c is 2^e_c · q_c, with q_c in ``weight`` and e_c in ``weight_exponent``. The exponent is the smallest for
which all entries of the row fit, |q| < 448. A power of two is exact and does not change the direction, so cosines need
q alone. Only the update and the conversion to other formats, which depend on lengths, need e.

PyTorch has no float8 arithmetic, so rows are converted to float32 block by block.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FLOAT8", "converted", "decoded", "power_of_two", "scaled_down", "widened", "write_rows"]

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
_LOWEST, _HIGHEST = -126, 126  # so that both 2^e and 2^-e are normal float32 numbers
ELEMENTS = 1 << 20  # converted to float32 at a time


def widened(rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Convert float8 ``rows`` to float32, exponents not applied. On a CPU, NaN becomes 480, which is > 448."""
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device) if out is None else out
    if rows.device.type != "cpu":
        return out.copy_(rows)
    # On a CPU PyTorch converts float8 entry by entry. Instead, its bits are placed into a float16, which is 2^-8 times
    # the value.
    halves = rows.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(0xBFFF - (1 << 16))
    return out.copy_(halves.view(torch.float16)).mul_(256.0)


def scaled_down(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scale ``rows`` (K, D) in place by 2^-e, with the smallest e such that max|row| < 448·2^e; e = 0 for a zero row.

    Returns e (K,) int8 and the rows. A row that is not finite becomes NaN.
    """
    least, most = rows.aminmax(dim=1)
    largest = torch.maximum(least.neg_(), most)
    exponent = torch.frexp(largest / LARGEST).exponent.clamp_(_LOWEST, _HIGHEST).to(torch.int8)
    factor = torch.where(largest.isfinite(), power_of_two(-exponent), torch.nan)
    return exponent, rows.mul_(factor[:, None])


def power_of_two(exponent: Tensor) -> Tensor:
    """2^e in float32, exact, for int8 e in [-126, 127]."""
    return exponent.to(torch.int32).add_(127).bitwise_left_shift_(23).view(torch.float32)


def converted(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert ``rows`` to ``dtype``; float8 without applying the exponents."""
    return (widened(rows) if rows.dtype == FLOAT8 else rows).to(dtype)


def decoded(weight: Tensor, exponent: Tensor) -> Tensor:
    """Return the prototypes 2^e · q, (K, D) in float32."""
    return widened(weight).mul_(power_of_two(exponent)[:, None])


@torch.no_grad()
def write_rows(weight: Tensor, exponent: Tensor | None, first: int, rows: Tensor) -> None:
    """Write ``rows`` (K, D) to prototypes ``[first, first + K)`` of ``weight`` (C, D), rounded to nearest.

    ``exponent`` (C,) is None unless the weight is float8. In float8, a row that is not finite becomes NaN.
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
