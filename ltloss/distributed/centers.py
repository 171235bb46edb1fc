"""Class centres that live with their classes: each rank keeps those of its own block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ltloss.distributed import collectives as comm
from ltloss.distributed.layout import Layout, block_of_first_rank, local
from ltloss.distributed.logsumexp import reduce_scatter_features
from ltloss.losses.class_centers import ClassCenters

__all__ = ["ShardedCenters"]


class ShardedCenters(ClassCenters):
    """:class:`ltloss.losses.class_centers.ClassCenters` whose buffers are DTensors, block by block on the class ranks.

    Every rank gives it the global batch. The cosine to a centre is known to the centre's owner, so each step sums one
    more N-vector over the class ranks, and its gradient is sent home by one more reduce-scatter.
    """

    def __init__(self, whole: ClassCenters, layout: Layout) -> None:
        nn.Module.__init__(self)
        self.update_rule, self.momentum, self.layout = whole.update_rule, whole.momentum, layout
        for name, buffer in (("centers", whole.centers), ("counts", whole.counts)):
            self.register_buffer(name, block_of_first_rank(buffer, layout))

    def _at_hand(self) -> tuple[Tensor, Tensor]:
        return local(self.centers), local(self.counts)

    def in_one_piece(self) -> ClassCenters:
        """Those of all ranks, copied."""
        whole = ClassCenters(1, 1, update=self.update_rule, momentum=self.momentum)
        for name, buffer in self._buffers.items():
            sharded: Any = buffer
            whole._buffers[name] = sharded.full_tensor() if self.layout.mesh else sharded.clone()
        return whole

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Take in the global batch: features (N, D), labels (N,) int64 or -1."""
        if local(self.counts).numel():
            super().update(features, self.layout.local_index(labels))

    def cosine(self, features: Tensor, labels: Tensor) -> Tensor:
        """cos(x_i, c_{y_i}) per sample of the global batch, (N,); 1 where the class was never seen."""
        layout = self.layout
        rows = layout.group_rows(features.shape[0])
        index = layout.local_index(labels)
        mine = index >= 0
        if local(self.counts).numel():
            cosine = torch.where(mine, super().cosine(_Partial.apply(features, layout, rows), index), 0.0)  # type: ignore[no-untyped-call]
        else:
            cosine = _Partial.apply(features, layout, rows)[:, 0] * 0.0  # type: ignore[no-untyped-call]
        summed: Tensor = comm.SumOverClasses.apply(cosine, layout.class_group)  # type: ignore[no-untyped-call]
        # A label that no rank has, -1, gets 1 as in the single process, where it reads class 0 and is not counted.
        return torch.where(labels < 0, 1.0, summed)


class _Partial(torch.autograd.Function):
    """The features as they are; their gradients, which the class ranks hold in parts, are summed and sent home."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, layout: Layout, rows: slice) -> Tensor:
        ctx.layout, ctx.rows = layout, rows
        return features.view_as(features)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        grad = grad_outputs[0]
        return reduce_scatter_features(grad[ctx.rows].contiguous(), grad.shape[0], ctx.layout), None, None
