"""Numerics that all backends share: the dtype of accumulation, inverse norms, deterministic sums of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ltloss.float8 import ELEMENTS, FLOAT8, LARGEST, widened

__all__ = ["add_rows_", "compute_dtype", "inverse_norm", "log_sum_of_others", "project_", "spans"]

# Squares of numbers outside this range overflow or underflow in float32, so the norm of such a row is taken in float64.
_TRUSTED_NORM = (1e-15, 1e15)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of sums: float64 if an input is float64, else float32. Nothing is accumulated in half precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive pieces of at most ``size``, as equal in length as possible.

    A last piece of one row would be multiplied by another routine (gemv), whose sums round differently. Equal
    prototypes would then have different cosines.
    """
    pieces = -(-total // size)
    for piece in range(pieces):
        yield piece * total // pieces, (piece + 1) * total // pieces


def add_rows_(target: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Do ``target[index[i]] += rows[i]`` in place, bitwise reproducible even where indices repeat.

    Each device has one operation that is not: index_put_(accumulate=True) on a CPU and index_add_ on a GPU add float32
    with atomics, in any order.
    """
    if target.device.type == "cpu":
        return target.index_add_(0, index, rows)
    return target.index_put_((index,), rows, accumulate=True)


def inverse_norm(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """1/‖v‖ of every row, and 0 for a zero row, so that its direction is 0.

    Args:
        vectors: (K, D), any floating dtype.
        dtype: dtype of the result and of the sum of squares.

    Returns:
        (K,). Rows whose squares overflow or underflow in float32 are computed in float64.
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
        else:  # for all rows: picking the suspicious ones would synchronise with the host
            exact = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
            inverse = torch.where(suspicious, _reciprocal(exact, dtype), inverse)
    return inverse


def _inverse_norm_of_float8(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`inverse_norm` of float8 rows, converted block by block. Their squares fit float32."""
    inverse = torch.empty(vectors.shape[0], dtype=dtype, device=vectors.device)
    for start, stop in spans(vectors.shape[0], max(1, ELEMENTS // max(1, vectors.shape[1]))):
        wide = widened(vectors[start:stop])
        norm = torch.linalg.vector_norm(wide, dim=1, dtype=dtype)
        norm.masked_fill_(torch.linalg.vector_norm(wide, torch.inf, dim=1) > LARGEST, torch.nan)
        inverse[start:stop] = _reciprocal(norm, dtype)
    return inverse


def _reciprocal(norm: Tensor, dtype: torch.dtype) -> Tensor:
    """1/norm in ``dtype``; 0 where that would overflow: so short a row counts as zero."""
    return torch.where(norm < torch.finfo(dtype).tiny, 0.0, norm.reciprocal()).to(dtype)


def project_(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Backpropagate through v̂ = v/‖v‖ in place: dv = (dv̂ − (dv̂·v̂) v̂)/‖v‖; 0 for a zero row."""
    with torch.autocast(grad.device.type, enabled=False):  # a backward runs under that of its caller
        along = torch.linalg.vecdot(grad, unit)
    return grad.addcmul_(unit, along[:, None], value=-1).mul_(inverse[:, None])


def log_sum_of_others(logsumexp: Tensor, logits: Tensor) -> Tensor:
    """r (N, k), for each target over all other classes, from r without the k targets (N,) and their logits (N, k)."""
    k = logits.shape[1]
    each = torch.cat([logits, logsumexp[:, None]], 1)[:, None].expand(-1, k, -1)
    each = each.masked_fill(torch.eye(k, k + 1, dtype=torch.bool, device=logits.device), -torch.inf)
    nothing = (each == -torch.inf).all(2)
    return torch.logsumexp(each.masked_fill(nothing[..., None], 0.0), 2).masked_fill(nothing, -torch.inf)
