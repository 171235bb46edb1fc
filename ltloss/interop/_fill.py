"""Rows that were read, into the block of this rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ltloss.distributed.layout import Layout, local
from ltloss.losses.prototype_head import PrototypeHead

__all__ = ["fill"]


def fill(head: PrototypeHead, found: tuple[int, int], origin: str, read: Callable[[int, int], Tensor]) -> None:
    """Put rows ``read(start, stop)`` into this rank's block."""
    wanted = tuple(head.weight.shape)
    if found != wanted:
        raise ValueError(f"{origin} holds prototypes {found} (C, D); the head has {wanted}")
    start, stop = Layout.of(head.weight).span()
    with torch.no_grad():
        local(head.weight).copy_(read(start, stop))
