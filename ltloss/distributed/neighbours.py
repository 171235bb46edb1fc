"""The classes nearest to those of a batch: hard negatives for a sample of the classes.

A table has the K nearest other prototypes of each class. A class is looked up when a batch has it, and searched anew
when what the table says of it is R steps old. So a step multiplies the prototypes of at most its own classes with all,
R steps those of at most C classes, and a table of all classes is never made at one go.

Rows of the table lie with the class that they are about. A step sends the rows of its classes, 16·K bytes each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ltloss.distributed import collectives as comm
from ltloss.distributed.layout import Layout, local
from ltloss.distributed.top_k import top_k
from ltloss.numerics import compute_dtype

__all__ = ["Neighbours"]


class _Table(NamedTuple):
    """What is known, 8·K bytes for each of this rank's classes and 8 for each class."""

    neighbour: Tensor  # (own, K) int32 among all classes; the index of a class, whatever the rows of its prototypes
    cosine: Tensor  # (own, K) float32, descending
    due: Tensor  # (C,) int64, alike on all ranks: the step from which on the class is searched anew


class Neighbours:
    """Which classes are nearest to those of a batch, and how near.

    Args:
        count: K, neighbours of a class, at most C − 1.
        refresh: R, steps that they are kept for.
    """

    def __init__(self, count: int, refresh: int) -> None:
        self.count, self.refresh = count, refresh
        self._table: _Table | None = None

    # A search breaks the graph several times, and goes wrong. torch.compiler.disable would import the compiler at once,
    # which takes longer than all else that a command needs after torch; this is how torch.optim leaves it for later.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def cosines(self, labels: Tensor, step: int, prototypes: Tensor, layout: Layout) -> Tensor:
        """For each of this rank's classes the largest cosine to a class of the batch whose neighbour it is, else −inf.

        Args:
            labels: (N,) of the global batch; those that are no class count nowhere.
            step: of the training.
            prototypes: (C, D).
        """
        table = self._table_of(layout)
        classes = torch.unique(labels[(labels >= 0) & (labels < layout.num_classes)])
        old = classes[table.due[classes] <= step]
        if old.numel():
            self._search(old, table, prototypes, layout)
            table.due[old] = step + self.refresh
        start, stop = layout.span()
        own = layout.local_index(classes)
        found = torch.zeros(2, classes.numel(), self.count, dtype=torch.float64, device=layout.device)
        mine = own >= 0
        found[0, mine] = table.neighbour[own[mine]].double()  # exact, and both go in one message
        found[1, mine] = table.cosine[own[mine]].double()
        neighbour, cosine = comm.all_reduce(found, layout.class_group).flatten(1)
        place = layout.local_index(neighbour.long())
        nearest = torch.full((stop - start + 1,), -torch.inf, dtype=torch.float64, device=layout.device)
        nearest.scatter_reduce_(0, torch.where(place < 0, stop - start, place), cosine, "amax")
        return nearest[:-1]

    def _table_of(self, layout: Layout) -> _Table:
        """The table; an empty one where there is none, or one of fewer classes."""
        if self._table is None or self._table.due.shape != (layout.num_classes,):
            start, stop = layout.span()
            with torch.inference_mode(False):  # it is filled in outside of it too
                neighbour = torch.zeros(stop - start, self.count, dtype=torch.int32, device=layout.device)
                due = torch.zeros(layout.num_classes, dtype=torch.int64, device=layout.device)
                self._table = _Table(neighbour, neighbour.float(), due)
        return self._table

    def _search(self, classes: Tensor, table: _Table, prototypes: Tensor, layout: Layout) -> None:
        """Fill in the rows of these classes (n,), ascending. Data groups share them, so that all have the same bits."""
        own = layout.local_index(classes)
        own = own[own >= 0]
        part = slice(layout.data_rank, None, layout.data_ranks)
        asked, rows = own[part], local(prototypes)
        best = top_k(rows[asked].to(compute_dtype(rows)), prototypes, self.count + 1)
        itself = best.index == asked[:, None] + layout.span()[0]
        others = itself.to(torch.uint8).argsort(dim=1, stable=True)[:, : self.count]
        found = torch.zeros(2, own.numel(), self.count, dtype=torch.float64, device=layout.device)
        found[0, part], found[1, part] = best.index.gather(1, others).double(), best.cosine.gather(1, others).double()
        if layout.data_group is not None:
            comm.all_reduce(found, layout.data_group)
        table.neighbour[own], table.cosine[own] = found[0].int(), found[1].float()

    def tensors(self, layout: Layout, *, make: bool = False) -> dict[str, Tensor]:
        """The table by name, its rows placed as the classes are, sharing its memory; nothing where there is none yet.

        ``make`` makes an empty one first, to be filled from a checkpoint.
        """
        table = self._table_of(layout) if make else self._table
        if table is None:
            return {}
        return {
            "neighbour": layout.place(table.neighbour),
            "neighbour_cosine": layout.place(table.cosine),
            "neighbour_due": table.due,
        }

    def forget(self) -> None:
        """Search every class anew."""
        self._table = None
