"""Comparing two blocks of prototypes: the nearest in the one for every class of the other, and the reverse at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ltloss.chunked.equal_rows import Copies
from ltloss.chunked.logsumexp import block_sizes
from ltloss.chunked.search import _Best, _Unit
from ltloss.numerics import compute_dtype, spans
from ltloss.ops.prototype_search import top_k_in_one_piece

__all__ = ["best_of_rows", "compare_blocks"]

Pair = tuple[Tensor, Tensor]


def compare_blocks(left: Tensor, right: Tensor, *, both: bool) -> tuple[Pair | None, Pair | None]:
    """Largest cosine and lowest index in ``right`` (B, D) per row of ``left`` (A, D), and the reverse.

    Returns:
        (A,) cosines and indices into ``right``; (B,) cosines and indices into ``left``. None where a block is empty,
        and for the reverse unless ``both``.
    """
    if not left.shape[0] or not right.shape[0]:
        return None, None
    if not both:
        cosine, index = top_k_in_one_piece(left, right, 1)
        return (cosine[:, 0], index[:, 0]), None
    dtype = compute_dtype(left, right)
    units = _Unit(left, dtype), _Unit(right, dtype)
    rows, columns = _Best(left.shape[0], units[0].inverse), _Best(right.shape[0], units[0].inverse)
    blocks = block_sizes(left.shape[0], right.shape[0], left.shape[1], left.device)
    for start, stop in spans(right.shape[0], blocks.classes):
        visitors = units[1][slice(start, stop)]
        for row in spans(left.shape[0], blocks.rows):
            tile = units[0][slice(*row)] @ visitors.t()
            rows.update(slice(*row), tile, 1, start)
            columns.update(slice(start, stop), tile, 0, row[0])
    return _lowest(rows.result(), right), _lowest(columns.result(), left)


def _lowest(found: Pair, among: Tensor) -> Pair:
    """Instead of each found prototype, the lowest one that is equal to it."""
    cosine, index = found
    copies = Copies(among, index)
    return cosine, copies.member(copies.group(index), 0) if copies.any else index


def best_of_rows(query: Tensor, own: Tensor, itself: Tensor) -> Pair | None:
    """Nearest of ``own`` (c, D) per query (R, D), leaving out the class ``itself`` (R,) where that is not -1.

    Returns:
        Cosines and local indices (R,), -inf and -1 where nothing is left; None where there are no classes at all.
    """
    if not own.shape[0] or not query.shape[0]:
        return None
    cosine, index = top_k_in_one_piece(query, own, min(2, own.shape[0]))
    if own.shape[0] == 1:
        blank = torch.full_like(cosine, -torch.inf), torch.full_like(index, -1)
        cosine, index = torch.cat([cosine, blank[0]], 1), torch.cat([index, blank[1]], 1)
    place = (index[:, :1] == itself[:, None]).to(torch.int64)
    return cosine.gather(1, place)[:, 0], index.gather(1, place)[:, 0]
