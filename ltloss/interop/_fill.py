"""Rows that were read, into the block of this rank."""

from __future__ import annotations

import torch
from torch import Tensor

from ltloss.distributed.layout import local
from ltloss.losses.prototype_head import PrototypeHead

__all__ = ["fill"]


def fill(head: PrototypeHead, found: tuple[int, int], origin: str, rows: Tensor) -> None:
    """Take this rank's ``rows`` of prototypes ``found`` (C, D); ValueError where the head has another shape."""
    wanted = tuple(head.weight.shape)
    if found != wanted:
        raise ValueError(f"{origin} holds prototypes {found} (C, D); the head has {wanted}")
    with torch.no_grad():
        local(head.weight).copy_(rows)
