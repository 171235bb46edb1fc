"""The best classes of each feature when the classes are spread over ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ltloss._types import TopK
from ltloss._validation import check_count, check_pair, plain_number
from ltloss.chunked import search as chunked
from ltloss.chunked.equal_rows import row_keys
from ltloss.distributed import collectives as comm
from ltloss.distributed.batch_gather import BatchGather
from ltloss.distributed.layout import Layout, local
from ltloss.numerics import compute_dtype
from ltloss.ops.prototype_search import best_classes, rows_for, top_k_in_one_piece

__all__ = ["top_k"]


@torch.no_grad()
def top_k(
    features: Tensor,
    prototypes: Tensor,
    k: int,
    gather: BatchGather | None = None,
    *,
    normalize_prototypes: bool = True,
    bias: Tensor | None = None,
) -> TopK:
    """As :func:`ltloss.functional.top_k` for a DTensor of prototypes: all ranks call it, each with its own features.

    Args:
        features: (n, D), of this rank; n may differ between the ranks, and be 0.
        prototypes: (C, D) DTensor.
        k: between 1 and C, the same on all ranks.
        gather: keeps what the ranks agreed on from call to call; None agrees anew.
        normalize_prototypes, bias: as there; the whole bias (C,) on every rank.

    Returns:
        ``TopK(cosine, index)``, (n, k) each, of this rank's features.

    Every rank finds the k best of its own classes for the whole batch and sends them to where the features came from:
    k·ranks candidates per feature. Equal prototypes on different ranks are told by a hash of their bits.
    """
    layout, k = Layout.of(prototypes), plain_number(k)

    def check() -> None:
        check_pair(features, prototypes)
        check_count("k", k, prototypes.shape[0], "the number of classes ")

    gather = gather or BatchGather(layout)
    batch = gather(features, -1, check, tag=k if isinstance(k, int) else 0)
    block = batch.features[layout.group_rows(batch.features.shape[0])].detach()
    centers = prototypes.shape[1] if prototypes.dim() == 3 else 1
    count = rows_for(k, layout.num_classes, centers)
    own, (start, stop) = local(prototypes).flatten(0, -2), layout.span()
    find = _nearest if normalize_prototypes else partial(_largest, bias=None if bias is None else bias[start:stop])
    width = 3 if normalize_prototypes else 4
    packed = _candidates(block, own, (start * centers, layout.num_classes * centers), (width, count), find)
    rows = [block.shape[0] // layout.class_ranks] * layout.class_ranks
    came = comm.all_to_all(packed, rows, rows, layout.class_group).view(layout.class_ranks, rows[0], width, count)
    bits, index, keys, *more = (
        came[:, : batch.real].permute(2, 1, 0, 3).reshape(width, batch.real, layout.class_ranks * count)
    )
    best, place = _merge(_numbers(bits, own, block), index, keys, count)
    if centers > 1:
        return best_classes(TopK(best, index.gather(1, place)), centers, k)
    return TopK(_numbers(more[0], own, block).gather(1, place) if more else best, index.gather(1, place))


def _bits(numbers: Tensor) -> Tensor:
    """As int64, to go in one message with indices."""
    return numbers.double().view(torch.int64)


def _numbers(bits: Tensor, *like: Tensor) -> Tensor:
    return bits.view(torch.float64).to(compute_dtype(*like))


def _nearest(block: Tensor, own: Tensor, k: int, first: int) -> list[Tensor]:
    """Cosines as bits, classes from ``first`` on, and keys that equal prototypes share; (B, k) each."""
    cosine, index = top_k_in_one_piece(block, own, k)
    return [_bits(cosine), index + first, row_keys(own, index)]


def _largest(block: Tensor, own: Tensor, k: int, first: int, *, bias: Tensor | None) -> list[Tensor]:
    """By x·w + b, and the cosines last; a key for each class, since equal rows may have different biases."""
    logit, cosine, index = chunked.top_k_of_products(block, own, k, bias)
    return [_bits(logit), index + first, index + first + 1, _bits(cosine)]


def _candidates(
    block: Tensor, own: Tensor, rows: tuple[int, int], shape: tuple[int, int], find: Callable[..., list[Tensor]]
) -> Tensor:
    """What ``find`` finds of the k best of this rank's classes, (B, width, k): -inf, C and 0 where there are fewer.

    ``rows``: the first of this rank's, and how many all have, C or with sub-centres C·K.
    """
    packed = torch.zeros(block.shape[0], *shape, dtype=torch.int64, device=block.device)
    packed[:, 0] = _bits(torch.tensor(-torch.inf))
    packed[:, 1] = rows[1]
    count = min(shape[1], own.shape[0])
    if count and block.shape[0]:
        packed[:, :, :count] = torch.stack(find(block, own, count, rows[0]), 1)
    return packed


def _merge(cosine: Tensor, index: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of the candidates (n, k·ranks) of all ranks, and their places; in class order where they are equal."""
    n, width = index.shape
    # Copies of one prototype may differ in the last bit of their cosine: all of them get the largest.
    # A place without a candidate (index = C) has key 0, which may be a key; its cosine -inf harms no group.
    first = torch.searchsorted(keys.sort(dim=1).values.contiguous(), keys.contiguous())
    best = torch.full_like(cosine, -torch.inf).scatter_reduce_(1, first, cosine.nan_to_num(torch.inf), "amax")
    shared = torch.where(cosine.isnan() | (cosine == -torch.inf), cosine, best.gather(1, first))
    order = index.argsort(dim=1, stable=True)
    ranked = shared.gather(1, order).sort(dim=1, descending=True, stable=True)
    chosen = order.gather(1, ranked.indices)[:, :k].reshape(n, min(k, width))
    return ranked.values[:, :k], chosen
