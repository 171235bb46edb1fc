"""The pass over prototypes that are spread over ranks: each works on its own classes, then N-vectors are exchanged.

Forward: every rank has the global batch and computes log-sum-exp and target cosine of its classes. One all-gather gives
each rank those of all; the ranks are splits like any other (:class:`ltloss._types.Partials`). Backward:
G_ic = a_i·exp(l_ic − r_i) needs the global r only, so each rank computes the gradient of its prototypes alone, and one
reduce-scatter sums dX and sends each row home.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltloss.distributed import collectives as comm
from ltloss.distributed.layout import Layout, own_part

__all__ = ["ClassShard", "reduce_scatter_features"]


@dataclass(frozen=True)
class ClassShard:
    """This rank's classes, or a sample of them; see :class:`ltloss.ops.margin_cross_entropy.Shard`.

    Args:
        layout: which rank has which classes.
        index: (K,) the sampled classes among this rank's, ascending; None for all.
        correction: (K,) to add to the prior of the sampled classes, or None.
    """

    layout: Layout
    index: Tensor | None = None
    correction: Tensor | None = None

    @classmethod
    def of(cls, prototypes: Tensor) -> ClassShard:
        """All classes of this rank's part of a DTensor (C, D)."""
        return cls(Layout.of(prototypes))

    def take(self, prototypes: Tensor) -> Tensor:
        """The prototypes of these classes (K, D), a function of all (C, D), whose gradient is therefore ordinary."""
        own = own_part(prototypes)
        return own if self.index is None else own.index_select(0, self.index)

    @property
    def is_first(self) -> bool:
        """Whether this is the first of the class ranks."""
        return self.layout.class_rank == 0

    def rows(self, samples: int) -> slice:
        """The rows of this rank's data group."""
        return self.layout.group_rows(samples)

    def local_labels(self, labels: Tensor) -> Tensor:
        """Labels counted from this rank's first class, or their place in the sample; -1 for those of other ranks."""
        labels = self.layout.local_index(labels)
        if self.index is None:
            return labels
        return torch.where(labels < 0, -1, torch.searchsorted(self.index, labels))  # every target is in the sample

    def local_prior(self, log_prior: Tensor | None) -> Tensor | None:
        """The prior of these classes, corrected for the chance that they were drawn."""
        prior = None if log_prior is None else log_prior[slice(*self.layout.span())]
        if prior is not None and self.index is not None:
            prior = prior[self.index]
        if self.correction is None:
            return prior
        return self.correction if prior is None else prior + self.correction

    def gather(self, vectors: Tensor) -> Tensor:
        """(k, n) of this rank's rows -> (class ranks, k, N)."""
        layout = self.layout
        gathered = comm.all_gather(vectors, layout.group).view(layout.data_ranks, layout.class_ranks, *vectors.shape)
        return gathered.permute(1, 2, 0, 3).reshape(layout.class_ranks, vectors.shape[0], -1)

    def reduce_features(self, gradient: Tensor, samples: int) -> Tensor:
        """Each row's gradient, summed, on the rank that it came from."""
        return reduce_scatter_features(gradient, samples, self.layout)

    def sum_gradients(self, factor: Tensor) -> Tensor:
        """The factor (N,) of the features, with the gradient of all rows: each rank has that of its own."""
        return comm.SumOfGradients.apply(factor, self.layout.group)  # type: ignore[no-any-return, no-untyped-call]

    def reduce_prototypes(self, gradient: Tensor) -> Tensor:
        """The sum over the data groups."""
        return gradient if self.layout.data_group is None else comm.all_reduce(gradient, self.layout.data_group)

    def reduce_prior(self, gradient: Tensor) -> Tensor:
        """The sum over the data groups, and each rank's classes in their place; 0 for those outside of the sample."""
        whole = gradient.new_zeros(self.layout.num_classes)
        own = whole[slice(*self.layout.span())]
        own[slice(None) if self.index is None else self.index] = gradient
        return comm.all_reduce(whole, self.layout.group)


def reduce_scatter_features(partial: Tensor, rows: int, layout: Layout) -> Tensor:
    """Sum the gradients (B, D) of a data group's rows over its ranks: (rows, D), zero but for this rank's own rows."""
    parts = partial.view(layout.class_ranks, partial.shape[0] // layout.class_ranks, partial.shape[1])
    result = partial.new_zeros(rows, partial.shape[1])
    result[layout.own_rows(rows)] = comm.reduce_scatter(parts, layout.class_group)
    return result
