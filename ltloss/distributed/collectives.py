"""Every message between ranks goes through these functions, so that a lost rank is reported the same way everywhere.

A group of one rank, or None (nothing initialised), sends nothing: each function then returns what it was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ltloss.errors import DistributedError, in_one_line
from ltloss.float8 import FLOAT8

__all__ = [
    "SumOfGradients",
    "SumOverClasses",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "exchange",
    "reduce_scatter",
]

Group = Any  # a torch.distributed.ProcessGroup; builds without torch.distributed lack the name

# PyTorch 2.13 renamed these two and warns about the former names.
_gather_into = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_scatter_sum = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def _ranks(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _sent(tensor: Tensor) -> Tensor:
    """As it goes over the wire: float8, which gloo does not know, as bytes."""
    return tensor.view(torch.uint8) if tensor.dtype == FLOAT8 else tensor


@contextmanager
def _reporting(what: str, group: Group) -> Iterator[None]:
    try:
        yield
    except DistributedError:
        raise
    except RuntimeError as error:  # DistBackendError is one
        reason = in_one_line(error, 300)
        raise DistributedError(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)}: {what} failed: another rank ended or did "
            f"not take part within the group's timeout ({reason}). Restart all ranks from the last checkpoint"
        ) from error


def all_gather(tensor: Tensor, group: Group) -> Tensor:
    """Tensors (...) of one shape on all ranks -> (ranks, ...)."""
    ranks = _ranks(group)
    tensor = tensor.contiguous()
    if ranks == 1:
        return tensor[None]
    result = tensor.new_empty(ranks * tensor.numel())
    with _reporting("all-gather", group):
        _gather_into(_sent(result), _sent(tensor.view(-1)), group=group)  # type: ignore[misc]
    return result.view(ranks, *tensor.shape)


def reduce_scatter(tensor: Tensor, group: Group) -> Tensor:
    """(ranks, ...) on every rank -> the sum over the ranks of the part that belongs to this one, (...)."""
    ranks = _ranks(group)
    if ranks == 1:
        return tensor[0]
    result = tensor.new_empty(tensor.shape[1:])
    if result.numel():
        with _reporting("reduce-scatter", group):
            _scatter_sum(result.view(-1), tensor.contiguous().view(-1), group=group)  # type: ignore[misc]
    return result


def all_reduce(tensor: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, in place."""
    if _ranks(group) > 1 and tensor.numel():
        with _reporting("all-reduce", group):
            dist.all_reduce(tensor, group=group)
    return tensor


class SumOverClasses(torch.autograd.Function):
    """Sum over the class ranks of what each computes from its own classes; every rank uses the sum alike."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        """The sum, a tensor of its own."""
        return all_reduce(part.clone(), group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """The gradient as it is: every rank has that of the same loss."""
        return grad_outputs[0], None


class SumOfGradients(torch.autograd.Function):
    """A tensor that all ranks have alike; what each computes from it depends on other rows of the batch."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        """The tensor as it is."""
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """The gradient, summed over the ranks."""
        return all_reduce(grad_outputs[0].clone(), ctx.group), None


def all_to_all(tensor: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    """Send rows ``send[k]`` of (Σ send, ...) to rank k, in order; return what came, (Σ receive, ...)."""
    if _ranks(group) == 1:
        return tensor
    result = tensor.new_empty(sum(receive), *tensor.shape[1:])
    with _reporting("all-to-all", group):
        dist.all_to_all_single(result, tensor.contiguous(), list(receive), list(send), group=group)
    return result


def broadcast(tensor: Tensor, source: int, group: Group) -> Tensor:
    """The tensor of the group's rank ``source``, in place on the others."""
    if _ranks(group) > 1 and tensor.numel():
        with _reporting("broadcast", group):
            dist.broadcast(_sent(tensor), dist.get_global_rank(group, source), group=group)
    return tensor


class exchange:
    """Send ``tensor`` to rank ``target`` while ``into`` is received from rank ``source``; ``wait()`` returns ``into``.

    The two transfers run beside whatever is computed until ``wait()``. Empty tensors are not sent.
    """

    def __init__(self, tensor: Tensor, target: int, into: Tensor, source: int, group: Group) -> None:
        self.tensor, self.into, self.group = tensor.contiguous(), into, group  # kept alive until they have gone
        operations = []
        if self.tensor.numel():
            operations.append(dist.P2POp(dist.isend, _sent(self.tensor), dist.get_global_rank(group, target), group))
        if into.numel():
            operations.append(dist.P2POp(dist.irecv, _sent(into), dist.get_global_rank(group, source), group))
        with _reporting("exchange", group):
            self.works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> Tensor:
        """Wait for both transfers."""
        with _reporting("exchange", self.group):
            for work in self.works:
                work.wait()
        return self.into
