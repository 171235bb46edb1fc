"""Small numerics that every backend shares: dtypes of accumulation, inverse lengths, deterministic sums of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ltloss.float8 import ELEMENTS, FLOAT8, LARGEST, widened

__all__ = ["add_rows_", "compute_dtype", "inverse_norm", "project_", "spans"]

# Squares of numbers outside this range leave float32's, so such rows get their norm in float64.
_TRUSTED_NORM = (1e-15, 1e15)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an input has it, float32 otherwise: half precision is never accumulated in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive pieces of at most ``size``, as equal in length as they can be.

    A ragged last piece of one row would be multiplied by another routine (gemv), whose sums round differently: equal
    prototypes would then not have equal cosines.
    """
    pieces = -(-total // size)
    for piece in range(pieces):
        yield piece * total // pieces, (piece + 1) * total // pieces


def add_rows_(target: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """``target[index[i]] += rows[i]``, in place, the same bits each time also where indices repeat.

    On a CPU index_put_(accumulate=True) adds float32 with atomics from several threads; on a GPU index_add_ does.
    """
    if target.device.type == "cpu":
        return target.index_add_(0, index, rows)
    return target.index_put_((index,), rows, accumulate=True)


def inverse_norm(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """1/‖v‖ of every row, and 0 for a zero row, which makes its direction 0.

    Args:
        vectors: (K, D), any floating dtype.
        dtype: of the result and of the sum of squares.

    Returns:
        (K,). Rows whose squares leave float32's range are computed in float64.
    """
    if vectors.dtype == FLOAT8:
        return _inverse_norm_of_float8(vectors, dtype)
    norm = torch.linalg.vector_norm(vectors, dim=1, dtype=dtype)
    inverse = _reciprocal(norm, dtype)
    if dtype != torch.float64:
        suspicious = ~((norm > _TRUSTED_NORM[0]) & (norm < _TRUSTED_NORM[1]))
        if vectors.device.type == "cpu":
            if bool(suspicious.any()):
                exact = torch.linalg.vector_norm(vectors[suspicious], dim=1, dtype=torch.float64)
                inverse[suspicious] = _reciprocal(exact, dtype)
        else:  # no look at the data: that would synchronise with the host
            exact = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
            inverse = torch.where(suspicious, _reciprocal(exact, dtype), inverse)
    return inverse


def _inverse_norm_of_float8(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """A piece at a time; no square leaves float32's range."""
    inverse = torch.empty(vectors.shape[0], dtype=dtype, device=vectors.device)
    for start, stop in spans(vectors.shape[0], max(1, ELEMENTS // max(1, vectors.shape[1]))):
        wide = widened(vectors[start:stop])
        norm = torch.linalg.vector_norm(wide, dim=1, dtype=dtype)
        norm.masked_fill_(torch.linalg.vector_norm(wide, torch.inf, dim=1) > LARGEST, torch.nan)
        inverse[start:stop] = _reciprocal(norm, dtype)
    return inverse


def _reciprocal(norm: Tensor, dtype: torch.dtype) -> Tensor:
    """1/norm in ``dtype``; 0 where it would overflow there: so short a row counts as zero."""
    return torch.where(norm < torch.finfo(dtype).tiny, 0.0, norm.reciprocal()).to(dtype)


def project_(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Through v̂ = v/‖v‖: dv = (dv̂ − (dv̂·v̂) v̂)/‖v‖, in place; 0 for a zero row."""
    return grad.addcmul_(unit, torch.linalg.vecdot(grad, unit)[:, None], value=-1).mul_(inverse[:, None])
