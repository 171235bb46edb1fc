"""`parallelize`: a loss module whose classes are spread over the ranks of a mesh."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ltloss.centers import ClassCenters
from ltloss.distributed import comm
from ltloss.distributed.batch import BatchGather, agree
from ltloss.distributed.centers import ShardedCenters
from ltloss.distributed.errors import DistributedError
from ltloss.distributed.layout import Layout
from ltloss.distributed.search import top_k
from ltloss.heads import PrototypeHead
from ltloss.types import TopK
from ltloss.backend import debug
from ltloss.validation import check_label_range, check_supervised

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ClassParallel", "parallelize"]

Head = TypeVar("Head", bound=PrototypeHead)


def parallelize(
    module: Head, mesh: DeviceMesh | None, *, capacity: int | None = None, averaged_backbone: bool = False
) -> Head:
    """Spread the classes of a loss module over the ranks of a mesh, in place. All ranks call it alike.

    Args:
        module: any loss module of this package, the same on all ranks (the weight of rank 0 counts). Built with
            ``device="meta"`` it never exists in one piece: see :meth:`ltloss.PrototypeHead.reset_parameters`.
        mesh: ``(class,)`` or ``(data, class)``, for instance :func:`class_mesh`; None (one process, nothing
            initialised) leaves the module as it is.
        capacity: rows that no rank's batch ever exceeds. None allows any lengths and reads a few integers of each
            step's message on the host.
        averaged_backbone: True where DDP or FSDP divides the gradients of the backbone by the number of ranks: those
            of the features are multiplied by it, so that the backbone gets the gradient of the global batch.

    Returns:
        The module. ``weight`` is a DTensor, ``Shard(0)`` over the class ranks; class centres likewise. Margins, priors,
        weights and counts (C,) stay whole on every rank, 4 bytes a class each. ``forward`` takes this rank's features
        and labels and returns the loss of the global batch (with ``reduction="none"``: the losses of this rank's
        samples); gradients equal those of one process. ``predict`` answers for this rank's features.

    Raises:
        ValueError, TypeError: bad arguments.
        DistributedError: the ranks have different modules.

    Example:
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.distributed import class_mesh, parallelize
        >>> loss_fn = parallelize(ArcFaceLoss(100, 16), class_mesh())  # the same line under torchrun and without
    """
    if not isinstance(module, PrototypeHead):
        raise TypeError(f"module must be a loss module of ltloss; got {type(module).__name__}")
    if isinstance(module, ClassParallel):
        raise ValueError("module is parallel already")
    if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1):
        raise ValueError(f"capacity must be None or an integer >= 1; got {capacity!r}")
    if mesh is None:
        return module
    layout = Layout(mesh, module.num_classes)
    layout.check()
    _check_same_module(module, layout)
    _shard(module, layout)
    kind = type(module)
    module.__class__ = type(f"ClassParallel{kind.__name__}", (ClassParallel, kind), {"__doc__": kind.__doc__})
    assert isinstance(module, ClassParallel)
    module.layout = layout
    module.batch = BatchGather(layout, capacity, float(layout.ranks) if averaged_backbone else 1.0)
    module.queries = BatchGather(layout)
    return module


def _check_same_module(module: PrototypeHead, layout: Layout) -> None:
    options = f"{type(module).__name__}({module.extra_repr()})"
    numbers = [module.num_classes, module.embedding_size, zlib.crc32(options.encode())]
    rows = agree(numbers, None, layout)
    if any(row != rows[0] for row in rows):
        ranks = [rank for rank, row in enumerate(rows) if row != rows[0]]
        raise DistributedError(
            f"module must be the same on all ranks; on {ranks} it is not that of rank 0. Rank {layout.rank}: {options}"
        )


def _shard(module: PrototypeHead, layout: Layout) -> None:
    from torch.distributed.tensor import distribute_tensor

    weight = module.weight
    sharded = distribute_tensor(weight.detach().to(layout.device), layout.mesh, layout.placements)
    module.weight = nn.Parameter(sharded, requires_grad=weight.requires_grad)
    for name, child in module.named_children():
        if isinstance(child, ClassCenters):
            setattr(module, name, ShardedCenters(child, layout))
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if not hasattr(buffer, "device_mesh"):
                owner._buffers[name] = comm.broadcast(buffer.to(layout.device), 0, layout.group)


class ClassParallel(PrototypeHead):
    """What :func:`parallelize` adds to a module: the batch is gathered before, and ``predict`` asks all ranks."""

    layout: Layout
    batch: BatchGather
    queries: BatchGather

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Loss of the global batch for this rank's features (n, D) and labels (n,)."""
        ignore_index: int = getattr(self, "ignore_index", -100)

        def check() -> None:
            check_supervised(features, self.weight, labels)
            if labels.device.type == "cpu" or debug:
                check_label_range(labels.to(torch.int64), self.num_classes, ignore_index)

        batch = self.batch(features, labels, check, padding=ignore_index)
        loss: Tensor = super().forward(batch.features, batch.labels)
        if loss.dim() == 0:
            return loss
        return _OwnLosses.apply(loss, batch.own, batch.count, self.layout)  # type: ignore[no-any-return, no-untyped-call]

    @torch.no_grad()
    def predict(self, features: Tensor, k: int = 1) -> TopK:
        """The k classes with the largest cosine for this rank's features (n, D); all ranks call it, with the same k."""
        return top_k(features, self.weight, k, self.queries)


class _OwnLosses(torch.autograd.Function):
    """This rank's samples of the losses (N,), of which every rank needs the upstream gradients of all."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, own: slice, count: int, layout: Layout) -> Tensor:
        ctx.layout, ctx.shape, ctx.rows = layout, losses.shape, own.stop - own.start
        return losses[own.start : own.start + count].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        padded = grad_outputs[0].new_zeros(ctx.rows)
        padded[: grad_outputs[0].shape[0]] = grad_outputs[0]
        return comm.all_gather(padded, ctx.layout.group).view(ctx.shape), None, None, None
