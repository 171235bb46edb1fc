"""Equal prototypes are told apart by their class index, whatever a matrix product makes of them.

The sum of a product's entry is taken in an order that depends on where in a tile the entry stands, so two equal
prototypes can get cosines that differ in the last bit, and a search would return now the one, now the other. Here the
classes that a search has found are replaced by the lowest ones with the same prototype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltloss.float8 import FLOAT8

__all__ = ["EqualRows", "row_keys"]

# Odd constants of a multiplicative hash (2^64 divided by the golden ratio, and the finaliser of splitmix64).
_GOLDEN, _MIX = -7046029254386353131, -7723592293110705685
_FEW_COLUMNS = 8
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _row_keys(rows: Tensor) -> Tensor:
    """A 64-bit hash of the bits of every row (K, D) -> (K,): equal for equal rows, -0 counting as 0."""
    if rows.dtype == FLOAT8:
        bits = rows.contiguous().view(torch.int8).to(torch.int64)
        bits = bits.masked_fill_(bits == -128, 0)
    else:
        bits = (rows + 0.0).contiguous().view(_INTEGERS[rows.element_size()]).to(torch.int64)
    column = torch.arange(1, rows.shape[1] + 1, device=rows.device) * _GOLDEN
    # A product only carries upwards, so high bits (the sign, for one) are folded down before each of the two.
    mixed = ((bits ^ (bits >> 32)) + column) * _MIX
    return ((mixed ^ (mixed >> 31)) * _GOLDEN).sum(1)


def row_keys(prototypes: Tensor, index: Tensor) -> Tensor:
    """A 64-bit hash of the prototypes (C, D) at ``index`` (any shape), equal for equal ones, a piece at a time."""
    flat = index.flatten()
    keys = torch.empty_like(flat)
    piece = max(1, (1 << 20) // max(1, prototypes.shape[1]))
    for start in range(0, flat.numel(), piece):
        keys[start : start + piece] = _row_keys(prototypes[flat[start : start + piece]])
    return keys.view(index.shape)


class EqualRows:
    """The classes that share their prototype, to the last bit, with one of the classes ``found``.

    Args:
        prototypes: (C, D).
        found: class indices of any shape, all in [0, C).

    ``any`` is False when there are surely none; the methods are then not to be called.
    """

    def __init__(self, prototypes: Tensor, found: Tensor) -> None:
        # A few columns rule out nearly every class without reading all of C×D.
        step = max(1, prototypes.shape[1] // _FEW_COLUMNS)
        few = _row_keys(prototypes[:, ::step][:, :_FEW_COLUMNS])
        self.classes = torch.isin(few, few[found]).nonzero()[:, 0]
        self.any = torch.unique(few[self.classes]).numel() < self.classes.numel()
        if not self.any:
            return
        keys = _row_keys(prototypes[self.classes])
        self.order = keys.argsort(stable=True)  # by key, then by class index
        ordered = keys[self.order]
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        position = torch.arange(keys.numel(), device=keys.device)
        starts = torch.where(first, position, 0).cummax(0).values
        self.start = torch.empty_like(starts).scatter_(0, self.order, starts)

    def group(self, index: Tensor) -> Tensor:
        """A number that exactly the equal classes share."""
        return self.start[torch.searchsorted(self.classes, index)]

    def member(self, group: Tensor, number: Tensor | int) -> Tensor:
        """The class that is number ``number`` (from 0, in ascending order) of its group."""
        return self.classes[self.order[group + number]]
