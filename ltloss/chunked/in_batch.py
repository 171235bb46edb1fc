"""In-batch losses in tiles: both directions of the N×N logits of two batches from one product.

A tile serves the softmax over its rows and the one over its columns. Two passes of :mod:`ltloss.chunked.logsumexp`
would take twice the products.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ltloss.chunked.logsumexp import SMALLEST_EXPONENT, SampleGradients, accumulate_exp
from ltloss.chunked.tiles import Tiles, block_sizes
from ltloss.numerics import compute_dtype, inverse_norm, project_, spans

__all__ = ["logsumexp", "logsumexp_gradients", "sigmoid_loss"]

# Called with a tile of logits, its rows and its columns. It may overwrite the tile with the gradient of these logits.
Visit = Callable[[Tensor, slice, slice], None]


class _Pairs:
    """The logits s·cos_ij of every row of a (N, D) with every row of b (N, D)."""

    def __init__(self, a: Tensor, b: Tensor, scale: Tensor) -> None:
        self.dtype = compute_dtype(a, b)
        self.a, self.b, self.scale = a, b, scale
        self.inverse_a, self.inverse_b = inverse_norm(a, self.dtype), inverse_norm(b, self.dtype)
        self.u = self._unit(a, self.inverse_a).mul_(scale)
        self.blocks = block_sizes(a.shape[0], b.shape[0], a.shape[1], a.device)
        self._spare = self.u.new_empty(self.blocks.rows * self.blocks.classes)

    def _unit(self, rows: Tensor, inverse: Tensor) -> Tensor:
        return rows.to(self.dtype) * inverse[:, None]

    def fit_one_exponential(self) -> bool:
        """Whether exp(l), for any |l| <= s, and the quotient of two such numbers stay normal, as far as is known.

        Then one exponential serves rows and columns, and none needs a shift. On a GPU the host does not look.
        """
        return self.scale.device.type == "cpu" and 2.0 * abs(float(self.scale)) <= -SMALLEST_EXPONENT[self.dtype]

    def spare(self, tile: Tensor) -> Tensor:
        """Room for another tile of this shape."""
        return self._spare[: tile.numel()].view(tile.shape)

    def target_logits(self) -> Tensor:
        """(N,) s·cos_ii."""
        target: Tensor = torch.linalg.vecdot(self.u, self._unit(self.b, self.inverse_b))
        return target

    def walk(self, visit: Visit, of_a: bool = False, of_b: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """Visit every tile; of what was left in them, the gradients of u (N, D) and of b (N, D) where asked for."""
        n = self.a.shape[0]
        tiles = Tiles(self.u, self.b, self.inverse_b, None, self.blocks)
        grad_u = torch.zeros_like(self.u) if of_a else None
        grad_b = torch.zeros_like(self.u) if of_b else None
        for start, stop in spans(n, self.blocks.classes):
            columns, unit = slice(start, stop), tiles.unit_prototypes(start, stop)
            for row in spans(n, self.blocks.rows):
                rows = slice(*row)
                tile = tiles.logits(unit, rows, start, stop)
                visit(tile, rows, columns)
                if grad_u is not None:
                    grad_u[rows].addmm_(tile, unit)
                if grad_b is not None:
                    grad_b[columns].addmm_(tile.t(), self.u[rows])
            if grad_b is not None:
                project_(grad_b[columns], unit, self.inverse_b[columns])
        return grad_u, grad_b

    def gradients(self, visit: Visit, needs: list[bool]) -> list[Tensor]:
        """Of a (N, D), of b (N, D) and of the scale (), in the dtype of the sums; (0,) where ``needs`` is False."""
        grad_u, grad_b = self.walk(visit, needs[0] or needs[2], needs[1])
        nothing = self.u.new_empty(0)
        grad_a = grad_scale = nothing
        if grad_u is not None:
            unit = self._unit(self.a, self.inverse_a)
            grad_scale = torch.linalg.vecdot(grad_u, unit).sum() if needs[2] else nothing
            grad_a = project_(grad_u.mul_(self.scale), unit, self.inverse_a) if needs[0] else nothing
        return [grad_a, nothing if grad_b is None else grad_b, grad_scale]


def _diagonal(tile: Tensor, rows: slice, columns: slice) -> Tensor:
    """The entries of a tile where row and column belong together, which may be none."""
    return tile.diagonal(rows.start - columns.start)


def _along_diagonal(vector: Tensor, rows: slice, columns: slice) -> Tensor:
    return vector[max(rows.start, columns.start) : min(rows.stop, columns.stop)]


def logsumexp(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r_i = log Σ_{j≠i} exp(s·cos_ij), r'_j = log Σ_{i≠j} exp(s·cos_ij) and s·cos_ii, (N,) each."""
    pairs = _Pairs(a, b, scale)
    single = pairs.fit_one_exponential()
    maximum = pairs.u.new_full((2, a.shape[0]), 0.0 if single else -math.inf)
    total = torch.zeros_like(maximum)

    def add(tile: Tensor, rows: slice, columns: slice) -> None:
        _diagonal(tile.exp_(), rows, columns).zero_()
        total[0, rows] += tile.sum(1)
        total[1, columns] += tile.sum(0)

    def add_shifted(tile: Tensor, rows: slice, columns: slice) -> None:
        _diagonal(tile, rows, columns).fill_(-math.inf)
        accumulate_exp(pairs.spare(tile).copy_(tile).t(), maximum[1, columns], total[1, columns])
        accumulate_exp(tile, maximum[0, rows], total[0, rows])

    pairs.walk(add if single else add_shifted)
    of_rows, of_columns = maximum + total.log_()
    return of_rows, of_columns.clone(), pairs.target_logits()


def logsumexp_gradients(
    grad_rows: Tensor,
    grad_columns: Tensor,
    grad_target: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    of_rows: Tensor,
    of_columns: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a and b, in their dtypes, and of the scale, from those of what :func:`logsumexp` gave."""
    pairs = _Pairs(a, b, scale)
    make = _single if pairs.fit_one_exponential() else _shifted
    visit = make(pairs, grad_rows, grad_columns, grad_target, of_rows, of_columns)
    grad_a, grad_b, grad_scale = pairs.gradients(visit, needs)
    return grad_a.to(a.dtype), grad_b.to(b.dtype), grad_scale


def _single(
    pairs: _Pairs, grad_rows: Tensor, grad_columns: Tensor, grad_target: Tensor, of_rows: Tensor, of_columns: Tensor
) -> Visit:
    """G_ij = exp(l_ij)·(a_i·exp(−r_i) + a'_j·exp(−r'_j)) beside the diagonal."""
    by_row, by_column = grad_rows * (-of_rows).exp_(), grad_columns * (-of_columns).exp_()

    def gradient(tile: Tensor, rows: slice, columns: slice) -> None:
        tile.exp_().mul_(torch.add(by_row[rows, None], by_column[columns], out=pairs.spare(tile)))
        _diagonal(tile, rows, columns).copy_(_along_diagonal(grad_target, rows, columns))

    return gradient


def _shifted(
    pairs: _Pairs, grad_rows: Tensor, grad_columns: Tensor, grad_target: Tensor, of_rows: Tensor, of_columns: Tensor
) -> Visit:
    """G_ij = a_i·exp(l_ij − r_i) + a'_j·exp(l_ij − r'_j) beside the diagonal, for any scale."""
    smallest = SMALLEST_EXPONENT[pairs.dtype]
    row = SampleGradients.of(of_rows, grad_rows, grad_target)
    column = SampleGradients.of(of_columns, grad_columns, torch.zeros_like(grad_target))

    def gradient(tile: Tensor, rows: slice, columns: slice) -> None:
        by_column = torch.sub(tile, column.shift[columns], out=pairs.spare(tile))
        for exponent in (by_column, tile.sub_(row.shift[rows, None])):
            torch.threshold_(exponent, smallest, -math.inf).exp_()
        _diagonal(by_column, rows, columns).zero_()
        _diagonal(tile, rows, columns).copy_(_along_diagonal(row.target, rows, columns))
        tile.mul_(row.factor[rows, None]).addcmul_(by_column, column.factor[columns])

    return gradient


def sigmoid_loss(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """−(1/N) Σ_ij log σ(z_ij·(s·cos_ij + bias)), z = 1 where i = j and −1 elsewhere, and its gradients.

    Those of a and b (N, D), of the scale and of the bias, in the dtype of the sums; (0,) where ``needs`` is False. The
    loss is a number, so its gradients need not wait for one from above, and the logits are made once.
    """
    pairs = _Pairs(a, b, scale)
    smallest, n = SMALLEST_EXPONENT[pairs.dtype], a.shape[0]
    total = pairs.u.new_zeros(2, dtype=torch.float64)  # of the losses, and of the gradients of the logits

    def visit(tile: Tensor, rows: slice, columns: slice) -> None:
        _diagonal(tile.add_(bias), rows, columns).neg_()
        total[0] += F.softplus(tile, threshold=80.0).sum()  # exact beyond it too: e^-80 is no part of 80
        if any(needs):
            _diagonal(torch.threshold_(tile, smallest, -math.inf).sigmoid_(), rows, columns).neg_()
            total[1] += tile.sum()

    grad_a, grad_b, grad_scale = (grad.div_(n) for grad in pairs.gradients(visit, needs))
    loss, grad_bias = (total / n).to(pairs.dtype)
    return loss, grad_a, grad_b, grad_scale, grad_bias.clone() if needs[3] else grad_bias.new_empty(0)
