"""The nearest prototype when the classes are spread over ranks, and the minimum-angle regulariser on top of it.

All classes: the blocks pass round the ranks. While a rank compares its own block with the one that has come, the next
one is already on its way; a comparison serves both blocks, so after half a turn every pair of classes was seen once,
and what was found for the visitor is sent home. A rank holds its own block, the visitor and the one in flight.

The gradient of a found pair goes to both of its ends: rows are exchanged between the two owners, as many as there are
pairs across ranks, and not blocks. Who sends how much is settled in the forward, so the backward asks the host nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltloss._types import NearestPrototype
from ltloss.chunked.equal_rows import EqualRows, row_keys
from ltloss.chunked.search import Best, UnitRows, search_precision
from ltloss.chunked.tiles import block_sizes
from ltloss.distributed import collectives as comm
from ltloss.distributed.layout import Layout, own_part
from ltloss.float8 import FLOAT8
from ltloss.margins import arccos
from ltloss.numerics import add_rows_, compute_dtype, inverse_norm, project_, spans
from ltloss.ops.prototype_search import nearest_in_one_piece, top_k_in_one_piece

__all__ = ["mean_angle_of_all", "nearest_prototype"]


class _Found(NamedTuple):
    """The best so far per row: cosine, index among all classes (-1: none) and key of that prototype, (K,) each."""

    cosine: Tensor
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    key: Tensor

    @classmethod
    def nothing(cls, rows: int, dtype: torch.dtype, device: torch.device) -> _Found:
        cosine = torch.full((rows,), -torch.inf, dtype=dtype, device=device)
        index = torch.full((rows,), -1, dtype=torch.int64, device=device)
        return cls(cosine, index, torch.zeros_like(index))

    def better(self, other: _Found) -> _Found:
        """The better of the two per row; of equal cosines, or of copies of one prototype, the lower index."""
        copies = (self.key == other.key) & (self.index >= 0) & (other.index >= 0)
        tie = copies | (self.cosine == other.cosine)
        take = torch.where(tie, other.index < self.index, (other.cosine > self.cosine) | other.cosine.isnan())
        return _Found(*(torch.where(take, theirs, ours) for ours, theirs in zip(self, other, strict=True)))

    def packed(self) -> Tensor:
        """The bits of all three, (3, K) int64."""
        return torch.stack([self.cosine.double().view(torch.int64), self.index, self.key])

    @classmethod
    def unpacked(cls, bits: Tensor, dtype: torch.dtype) -> _Found:
        return cls(bits[0].view(torch.float64).to(dtype), bits[1], bits[2])


def nearest_prototype(prototypes: Tensor, rows: Tensor | None, allow_tf32: bool) -> NearestPrototype:
    """As :func:`ltloss.functional.nearest_prototype` for a DTensor of prototypes (C, D).

    Returns:
        For ``rows=None`` two DTensors (C,), sharded as the classes are; for ``rows`` (R,), which must be the same on
        all ranks, two tensors (R,) that all ranks have.
    """
    layout = Layout.of(prototypes)
    cosine, index = _search(prototypes, rows, allow_tf32, layout)
    if rows is not None:
        return NearestPrototype(cosine, index)
    return NearestPrototype(layout.place(cosine), layout.place(index))


def _search(prototypes: Tensor, rows: Tensor | None, allow_tf32: bool, layout: Layout) -> tuple[Tensor, Tensor]:
    own = own_part(prototypes)
    found: tuple[Tensor, Tensor]
    with search_precision(allow_tf32), torch.autocast(own.device.type, enabled=False):
        if rows is None:
            needs_grad = torch.is_grad_enabled() and own.requires_grad
            found = _NearestOfAll.apply(own, layout, needs_grad)  # type: ignore[no-untyped-call]
        else:
            found = _NearestOfRows.apply(own, rows, layout)  # type: ignore[no-untyped-call]
    return found


def mean_angle_of_all(prototypes: Tensor, class_counts: Tensor | None, power: float, allow_tf32: bool) -> Tensor:
    """:func:`ltloss.functional.min_angle_regularizer` over all classes of a DTensor: the same scalar on all ranks."""
    layout = Layout.of(prototypes)
    cosine, _ = _search(prototypes, None, allow_tf32, layout)
    if layout.num_classes == 1:
        return (cosine * 0.0).sum()
    weights = torch.ones_like(cosine).detach()
    if class_counts is not None:
        weights = class_counts[slice(*layout.span())].to(cosine.dtype) ** -power
    sums = torch.stack([-(weights * arccos(cosine)).sum(), weights.sum()])
    angle, total = comm.SumOverClasses.apply(sums, layout.class_group)  # type: ignore[no-untyped-call]
    mean: Tensor = angle / total
    return mean


def _round(own: Tensor, layout: Layout) -> _Found:
    """The nearest other class of each own class, by passing blocks half a turn round the class ranks."""
    ranks, me, group = layout.class_ranks, layout.class_rank, layout.class_group
    dtype, offset = compute_dtype(own), layout.span()[0]
    found = _Found.nothing(own.shape[0], dtype, own.device)
    steps = ranks // 2
    coming = _next_block(own, 1, layout) if steps else None
    if own.shape[0] > 1:
        cosine, index = nearest_in_one_piece(own.detach(), None, False)
        found = _Found(cosine, index + offset, row_keys(own, index))
    for step in range(1, steps + 1):
        assert coming is not None
        visitor = coming.wait()
        coming = _next_block(visitor, step + 1, layout) if step < steps else None
        owner = (me - step) % ranks
        theirs = layout.span(owner)[0]
        once = 2 * step == ranks  # the two ranks face each other: each answers for itself
        rows, columns = _compare_blocks(own, visitor, both=not once)
        if rows is not None:
            found = found.better(_Found(rows[0], rows[1] + theirs, row_keys(visitor, rows[1])))
        if not once:
            answer = _Found.nothing(visitor.shape[0], dtype, own.device)
            if columns is not None:
                answer = _Found(columns[0], columns[1] + offset, row_keys(own, columns[1]))
            into = torch.empty(3, own.shape[0], dtype=torch.int64, device=own.device)
            answers = comm.exchange(answer.packed(), owner, into, (me + step) % ranks, group).wait()
            found = found.better(_Found.unpacked(answers, dtype))
    return found._replace(cosine=found.cosine.clamp(-1.0, 1.0))


def _next_block(block: Tensor, step: int, layout: Layout) -> comm.exchange:
    """Pass ``block`` on, and start to receive the one whose owner stands ``step`` places before this rank."""
    ranks, me = layout.class_ranks, layout.class_rank
    into = block.new_empty(layout.size((me - step) % ranks), block.shape[1])
    return comm.exchange(block, (me + 1) % ranks, into, (me - 1) % ranks, layout.class_group)


class _Pairs(NamedTuple):
    """The found pairs, ordered by the rank that owns the second class; counts are known to the host."""

    order: Tensor  # (c,) own classes in that order
    asked: Tensor  # (k,) own classes that others (and this rank) have found
    send: list[int]
    receive: list[int]

    @classmethod
    def settle(cls, index: Tensor, layout: Layout) -> _Pairs:
        owner = index // layout.block
        order = owner.argsort(stable=True)
        counts = torch.bincount(owner, minlength=layout.class_ranks)
        ones = [1] * layout.class_ranks
        back = comm.all_to_all(counts, ones, ones, layout.class_group)
        send, receive = counts.tolist(), back.tolist()
        asked = comm.all_to_all(index[order], send, receive, layout.class_group) - layout.span()[0]
        return cls(order, asked, send, receive)


class _NearestOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, layout: Layout, needs_grad: bool) -> tuple[Tensor, Tensor]:
        if layout.num_classes == 1:
            minus = torch.full((own.shape[0],), -1, dtype=torch.int64, device=own.device)
            cosine, index = minus.to(compute_dtype(own)), minus
            ctx.pairs = None
        else:
            found = _round(own, layout)
            cosine, index = found.cosine, found.index
            ctx.pairs = _Pairs.settle(index, layout) if needs_grad else None
        ctx.layout = layout
        ctx.save_for_backward(own)
        ctx.mark_non_differentiable(index)
        return cosine, index

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (own,) = ctx.saved_tensors
        if ctx.pairs is None:
            return torch.zeros_like(own), None, None
        order, asked, send, receive = ctx.pairs
        group, dtype = ctx.layout.class_group, compute_dtype(own)
        inverse = inverse_norm(own, dtype)
        unit = own.to(dtype) * inverse[:, None]
        weight = grad_outputs[0].to(dtype)[order, None]
        grad = torch.empty_like(unit)
        grad[order] = weight * comm.all_to_all(unit[asked], receive, send, group)
        add_rows_(grad, asked, comm.all_to_all(weight * unit[order], send, receive, group))
        return project_(grad, unit, inverse).to(own.dtype), None, None


class _NearestOfRows(torch.autograd.Function):
    """For classes (R,) that all ranks name alike: their prototypes are shown to all, and each searches its block."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, rows: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        mine = layout.local_index(rows)
        query = _shown(own, mine, layout)
        dtype = compute_dtype(own)
        found = _best_of_rows(query, own, mine)
        if found is None:
            best = _Found.nothing(rows.numel(), dtype, own.device)
        else:
            valid = found[1] >= 0
            index = torch.where(valid, found[1] + layout.span()[0], -1)
            best = _Found(found[0], index, row_keys(own, found[1].clamp_min(0)))
        gathered = comm.all_gather(best.packed(), layout.class_group)
        best = _Found.unpacked(gathered[0], dtype)
        for other in gathered[1:]:
            best = best.better(_Found.unpacked(other, dtype))
        cosine = torch.where(best.index < 0, -1.0, best.cosine.clamp(-1.0, 1.0))
        ctx.layout = layout
        ctx.save_for_backward(own, rows, best.index, query)
        ctx.mark_non_differentiable(best.index)
        return cosine, best.index

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        own, rows, index, query = ctx.saved_tensors
        layout, dtype = ctx.layout, compute_dtype(own)
        near = _shown(own, layout.local_index(index), layout)
        inverse = inverse_norm(own, dtype)
        unit = own.to(dtype) * inverse[:, None]
        weight = torch.where(index >= 0, grad_outputs[0], 0.0).to(dtype)[:, None]
        grad = torch.zeros_like(unit)
        if own.shape[0]:
            for ends, partner in ((rows, near), (index, query)):
                mine = layout.local_index(ends)[:, None]
                direction = partner.to(dtype) * inverse_norm(partner, dtype)[:, None]
                add_rows_(grad, mine[:, 0].clamp_min(0), torch.where(mine >= 0, weight * direction, 0.0))
            project_(grad, unit, inverse)
        return grad.to(own.dtype), None, None


def _shown(own: Tensor, mine: Tensor, layout: Layout) -> Tensor:
    """Prototypes (R, D) by their local index (R,), -1 where another class rank has them; all ranks get all."""
    values = own.view(torch.uint8) if own.dtype == FLOAT8 else own  # no backend sums float8; one rank has more than 0
    rows = values.new_zeros(mine.shape[0], own.shape[1])
    if own.shape[0]:
        rows = torch.where((mine >= 0)[:, None], values[mine.clamp_min(0)], 0)
    return comm.all_reduce(rows, layout.class_group).view(own.dtype)


Pair = tuple[Tensor, Tensor]


def _compare_blocks(left: Tensor, right: Tensor, *, both: bool) -> tuple[Pair | None, Pair | None]:
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
    units = UnitRows(left, dtype), UnitRows(right, dtype)
    rows, columns = Best(left.shape[0], units[0].inverse), Best(right.shape[0], units[0].inverse)
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
    copies = EqualRows(among, index)
    return cosine, copies.member(copies.group(index), 0) if copies.any else index


def _best_of_rows(query: Tensor, own: Tensor, itself: Tensor) -> Pair | None:
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
