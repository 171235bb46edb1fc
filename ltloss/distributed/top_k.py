"""The best classes of each feature when the classes are spread over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from ltloss._types import TopK
from ltloss._validation import check_k, check_pair
from ltloss.chunked.equal_rows import row_keys
from ltloss.distributed import collectives as comm
from ltloss.distributed.batch_gather import BatchGather
from ltloss.distributed.layout import Layout, local
from ltloss.numerics import compute_dtype
from ltloss.ops.prototype_search import top_k_in_one_piece

__all__ = ["top_k"]


@torch.no_grad()
def top_k(features: Tensor, prototypes: Tensor, k: int, gather: BatchGather | None = None) -> TopK:
    """As :func:`ltloss.functional.top_k` for a DTensor of prototypes: all ranks call it, each with its own features.

    Args:
        features: (n, D), of this rank; n may differ between the ranks, and be 0.
        prototypes: (C, D) DTensor.
        k: between 1 and C, the same on all ranks.
        gather: keeps what the ranks agreed on from call to call; None agrees anew.

    Returns:
        ``TopK(cosine, index)``, (n, k) each, of this rank's features.

    Every rank finds the k best of its own classes for the whole batch and sends them to where the features came from:
    k·ranks candidates per feature. Equal prototypes on different ranks are told by a hash of their bits.
    """
    layout = Layout.of(prototypes)

    def check() -> None:
        check_pair(features, prototypes)
        check_k(k, prototypes.shape[0])

    gather = gather or BatchGather(layout)
    labels = torch.full(features.shape[:1], -1, device=layout.device)
    batch = gather(features, labels, check, tag=k)
    block = batch.features[layout.group_rows(batch.features.shape[0])].detach()
    cosine, index, keys = _candidates(block, local(prototypes), layout, k)
    packed = torch.stack([cosine.double().view(torch.int64), index, keys], 1)  # (B, 3, k): bits, whatever they mean
    rows = [block.shape[0] // layout.class_ranks] * layout.class_ranks
    came = comm.all_to_all(packed, rows, rows, layout.class_group).view(layout.class_ranks, rows[0], 3, k)
    bits, index, keys = came[:, : batch.real].permute(2, 1, 0, 3).reshape(3, batch.real, layout.class_ranks * k)
    return _merge(bits.view(torch.float64).to(cosine.dtype), index, keys, k)


def _candidates(block: Tensor, own: Tensor, layout: Layout, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of this rank's classes, (B, k) each: cosine (-inf where there are fewer), index among all, key."""
    dtype = compute_dtype(block, own)
    cosine = block.new_full((block.shape[0], k), -torch.inf, dtype=dtype)
    index = torch.full_like(cosine, layout.num_classes, dtype=torch.int64)
    keys = torch.zeros_like(index)
    found = min(k, own.shape[0])
    if found and block.shape[0]:
        cosine[:, :found], here = top_k_in_one_piece(block, own, found)
        index[:, :found] = here + layout.span()[0]
        keys[:, :found] = row_keys(own, here)
    return cosine, index, keys


def _merge(cosine: Tensor, index: Tensor, keys: Tensor, k: int) -> TopK:
    """The k best of the candidates (n, k·ranks) of all ranks, which stand in class order where cosines are equal."""
    n, width = index.shape
    # Copies of one prototype may differ in the last bit of their cosine: all of them get the largest.
    # A place without a candidate (index = C) has key 0, which may be a key; its cosine -inf harms no group.
    first = torch.searchsorted(keys.sort(dim=1).values.contiguous(), keys.contiguous())
    best = torch.full_like(cosine, -torch.inf).scatter_reduce_(1, first, cosine.nan_to_num(torch.inf), "amax")
    shared = torch.where(cosine.isnan() | (cosine == -torch.inf), cosine, best.gather(1, first))
    order = index.argsort(dim=1, stable=True)
    ranked = shared.gather(1, order).sort(dim=1, descending=True, stable=True)
    chosen = order.gather(1, ranked.indices)[:, :k].reshape(n, min(k, width))
    return TopK(ranked.values[:, :k], index.gather(1, chosen))
