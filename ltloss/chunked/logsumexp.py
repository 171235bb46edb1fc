"""The operations in chunked PyTorch: bounded memory, any device, no Triton.

Classes are taken a chunk at a time, so that the logits of a chunk stay in the cache: they are written, reduced and
forgotten. The backward computes them again. Per chunk that is one matrix product forwards and three backwards;
everything else touches only data that is already in the cache, which is why four products run faster here than the
three of a dense implementation that streams its N×C logits through memory several times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["cosine_logsumexp", "cosine_logsumexp_backward"]

# exp() below this is set to zero. e^-80 is far below float32's resolution of a probability, yet far enough above its
# smallest normal number for products with it to stay normal too: denormals slow a matrix product tenfold and more.
# In float64 the bound lies as far above its own smallest normal, so that confident samples keep their tiny gradient.
SMALLEST_EXPONENT = {torch.float32: -80.0, torch.float64: -700.0}

# Squares of numbers outside this range leave float32's, so such rows get their norm in float64.
_TRUSTED_NORM = (1e-15, 1e15)


class Blocks(NamedTuple):
    """How many rows and how many classes one tile of logits holds."""

    rows: int
    classes: int


def block_sizes(rows: int, classes: int, width: int, device: torch.device) -> Blocks:
    """Choose the tile: both it and the normalised prototypes beside it hold at most ``budget`` elements.

    4 MiB each on a CPU (measured, see docs/performance.md: 2 to 16 MiB are within a tenth of each other, 1 and 32 MiB
    slower); 64 MiB on a GPU, where each launch has to pay for itself.
    """
    budget = 1 << (20 if device.type == "cpu" else 24)
    row_block = max(1, min(rows, 1024))
    class_block = max(64, min(budget // row_block, budget // max(1, width)))
    return Blocks(row_block, min(class_block, classes))


def spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive pieces of at most ``size``, as equal in length as they can be.

    A ragged last piece of one row would be multiplied by another routine (gemv), whose sums round differently: equal
    prototypes would then not have equal cosines.
    """
    pieces = -(-total // size)
    for piece in range(pieces):
        yield piece * total // pieces, (piece + 1) * total // pieces


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an input has it, float32 otherwise: half precision is never accumulated in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


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


def _reciprocal(norm: Tensor, dtype: torch.dtype) -> Tensor:
    """1/norm in ``dtype``; 0 where it would overflow there: so short a row counts as zero."""
    return torch.where(norm < torch.finfo(dtype).tiny, 0.0, norm.reciprocal()).to(dtype)


def _scaled_features(features: Tensor, inverse: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """u = s·x̂, or s·x where no inverse norms are given."""
    u = features.to(dtype)
    if inverse.numel():
        u = u * inverse[:, None]  # one factor at a time: inverse * scale may overflow for a tiny row
    return u * scale


class OwnColumn:
    """Reads and writes the own-class entry of every row of a tile, for labels inside and outside of it alike.

    Gather, select and scatter on N-vectors need no list of the labels inside, hence no host synchronisation on a GPU.
    """

    def __init__(self, labels: Tensor, start: int, width: int) -> None:
        local = labels - start
        self.inside = ((local >= 0) & (local < width))[:, None]
        self.column = local.clamp(0, width - 1)[:, None]

    def fill(self, tile: Tensor, value: Tensor | float) -> None:
        fill = value[:, None] if isinstance(value, Tensor) else tile.new_tensor(value)
        tile.scatter_(1, self.column, torch.where(self.inside, fill, tile.gather(1, self.column)))


class _Tiles:
    """Walks over the classes in chunks: normalised prototypes and logits in buffers that are allocated once."""

    def __init__(
        self, u: Tensor, prototypes: Tensor, inverse: Tensor, log_prior: Tensor | None, blocks: Blocks
    ) -> None:
        self.u, self.prototypes, self.inverse, self.log_prior = u, prototypes, inverse, log_prior
        self.blocks = blocks
        self._logits = u.new_empty(blocks.rows * blocks.classes)
        self._unit = u.new_empty(blocks.classes, u.shape[1])

    def unit_prototypes(self, start: int, stop: int) -> Tensor:
        """ŵ of the chunk (stop - start, D)."""
        unit = self._unit[: stop - start]
        return torch.mul(self.prototypes[start:stop], self.inverse[start:stop, None], out=unit)

    def logits(self, unit: Tensor, rows: slice, start: int, stop: int) -> Tensor:
        """s·cos + log-prior of one row block and the chunk."""
        u = self.u[rows]
        tile = self._logits[: u.shape[0] * (stop - start)].view(u.shape[0], stop - start)
        torch.mm(u, unit.t(), out=tile)
        if self.log_prior is not None:
            tile.add_(self.log_prior[start:stop])
        return tile


def cosine_logsumexp(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    scale: float,
    normalize_features: bool,
    with_logit_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`ltloss.ops.cosine_logsumexp`."""
    dtype = compute_dtype(features, prototypes)
    n, (c, d) = features.shape[0], prototypes.shape
    feature_inverse = inverse_norm(features, dtype) if normalize_features else features.new_empty(0, dtype=dtype)
    u = _scaled_features(features, feature_inverse, scale, dtype)
    blocks = block_sizes(n, c, d, features.device)
    prototype_inverse = u.new_empty(c)
    tiles = _Tiles(u, prototypes, prototype_inverse, None if log_prior is None else log_prior.to(dtype), blocks)
    maximum = u.new_full((n,), -math.inf)
    total = u.new_zeros(n)
    unit_sum = u.new_zeros(d)
    for start, stop in spans(c, blocks.classes):
        prototype_inverse[start:stop] = inverse_norm(prototypes[start:stop], dtype)
        unit = tiles.unit_prototypes(start, stop)
        if with_logit_sum:
            unit_sum += unit.sum(0)
        for row in spans(n, blocks.rows):
            rows = slice(*row)
            tile = tiles.logits(unit, rows, start, stop)
            OwnColumn(labels[rows], start, stop - start).fill(tile, -math.inf)
            _accumulate_exp(tile, maximum[rows], total[rows])
    own = _own_logit(u, prototypes, prototype_inverse, labels)
    logit_sum = u @ unit_sum if with_logit_sum else u.new_empty(0)
    return maximum + total.log(), own, logit_sum, feature_inverse, prototype_inverse


def _accumulate_exp(tile: Tensor, maximum: Tensor, total: Tensor) -> None:
    """One step of the running log-sum-exp: log Σ exp = maximum + log(total). The tile is used up."""
    new = torch.maximum(maximum, tile.amax(1))
    # A row without any other class so far has maximum -inf, and -inf - (-inf) would be NaN.
    shift = torch.where(new == -math.inf, 0.0, new)
    total.mul_((maximum - shift).exp_()).add_(tile.sub_(shift[:, None]).exp_().sum(1))
    maximum.copy_(new)


def _own_logit(u: Tensor, prototypes: Tensor, inverse: Tensor, labels: Tensor) -> Tensor:
    """u·ŵ_y per sample, 0 where the label lies outside the prototypes. N·D work, and no rounding from a tile."""
    inside = (labels >= 0) & (labels < prototypes.shape[0])
    safe = torch.where(inside, labels, 0)
    own = torch.linalg.vecdot(u, prototypes[safe].to(u.dtype) * inverse[safe, None])
    return torch.where(inside, own, 0.0)


class _Upstream(NamedTuple):
    """The gradients that arrive per sample, in the form that the tiles use them."""

    shift: Tensor  # (N,) r - log|a|
    factor: Tensor  # (N,) sign of a, times what rounding the shift has lost
    own: Tensor  # (N,) d / factor
    logit_sum: Tensor | None  # (N,) e

    @classmethod
    def of(cls, grads: tuple[Tensor | None, Tensor | None, Tensor | None], other_logsumexp: Tensor) -> _Upstream:
        """|a|·exp(l - r) in one exponential: the coefficient goes into the exponent and its sign onto u and d.

        That spares one pass over every tile. Where there is nothing to send back (a = 0, or no other class at all) the
        shift is +inf. For a large scale, rounding r - log|a| would be the largest error of all; it is the same for a
        whole row, and goes with the sign.
        """
        zeros = torch.zeros_like(other_logsumexp)
        a, d = (zeros if grad is None else grad for grad in grads[:2])
        nothing = (a == 0) | (other_logsumexp == -math.inf)
        log_a = a.abs().log()
        shift = other_logsumexp - log_a
        lost = torch.where(nothing, 0.0, (shift - other_logsumexp) + log_a)
        factor = torch.where(a < 0, -1.0, 1.0).to(zeros.dtype) * lost.exp()
        return cls(torch.where(nothing, math.inf, shift), factor, d / factor, grads[2])


def cosine_logsumexp_backward(
    grad_other: Tensor | None,
    grad_own: Tensor | None,
    grad_sum: Tensor | None,
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    other_logsumexp: Tensor,
    feature_inverse: Tensor,
    prototype_inverse: Tensor,
    scale: float,
    normalize_features: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """See :func:`ltloss.ops.cosine_logsumexp_backward`."""
    dtype = compute_dtype(features, prototypes)
    n, (c, d) = features.shape[0], prototypes.shape
    if n == 0:
        return features.new_empty((0, d) if needs[0] else 0), prototypes.new_zeros((c, d) if needs[1] else 0)
    u = _scaled_features(features, feature_inverse, scale, dtype)
    blocks = block_sizes(n, c, d, features.device)
    tiles = _Tiles(u, prototypes, prototype_inverse, None if log_prior is None else log_prior.to(dtype), blocks)
    upstream = _Upstream.of((grad_other, grad_own, grad_sum), other_logsumexp)
    grad_u = torch.zeros_like(u) if needs[0] else None
    grad_w = prototypes.new_empty(c, d) if needs[1] else None
    signed_u = u * upstream.factor[:, None]
    sum_row = None if grad_sum is None else grad_sum @ u
    unit_sum = u.new_zeros(d)
    for start, stop in spans(c, blocks.classes):
        unit = tiles.unit_prototypes(start, stop)
        if grad_sum is not None:
            unit_sum += unit.sum(0)
        in_place = grad_w is not None and grad_w.dtype == dtype
        chunk = grad_w[start:stop] if grad_w is not None and in_place else torch.empty_like(unit)
        for row in spans(n, blocks.rows):
            rows = slice(*row)
            tile = _gradient_tile(tiles, unit, rows, (start, stop), labels[rows], upstream)
            if grad_u is not None:
                grad_u[rows].addmm_(tile, unit)
            if grad_w is not None:
                chunk.addmm_(tile.t(), signed_u[rows], beta=0 if row[0] == 0 else 1)
        if grad_w is not None:
            chunk = chunk if sum_row is None else chunk.add_(sum_row)
            project_(chunk, unit, prototype_inverse[start:stop])
            if not in_place:
                grad_w[start:stop] = chunk
    if grad_u is not None:
        grad_u *= upstream.factor[:, None]
        if grad_sum is not None:
            grad_u.addr_(grad_sum, unit_sum)
        grad_u *= scale  # u = s·x̂, or s·x
        if normalize_features:
            project_(grad_u, features.to(dtype) * feature_inverse[:, None], feature_inverse)
    return (
        features.new_empty(0) if grad_u is None else grad_u.to(features.dtype),
        prototypes.new_empty(0) if grad_w is None else grad_w,
    )


def _gradient_tile(
    tiles: _Tiles, unit: Tensor, rows: slice, classes: tuple[int, int], labels: Tensor, upstream: _Upstream
) -> Tensor:
    """G with the factor of the row still to come: |a|·exp(l - r), and d / factor at the own class."""
    tile = tiles.logits(unit, rows, *classes).sub_(upstream.shift[rows, None])
    torch.threshold_(tile, SMALLEST_EXPONENT[tile.dtype], -math.inf).exp_()
    OwnColumn(labels, classes[0], tile.shape[1]).fill(tile, upstream.own[rows])
    return tile


def project_(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Through v̂ = v/‖v‖: dv = (dv̂ − (dv̂·v̂) v̂)/‖v‖, in place; 0 for a zero row."""
    return grad.addcmul_(unit, torch.linalg.vecdot(grad, unit)[:, None], value=-1).mul_(inverse[:, None])
