"""Clipping by the norm of all gradients, those of a sharded head and those of its backbone together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ltloss._validation import check_number
from ltloss.distributed import collectives as comm
from ltloss.distributed.layout import local

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Shorten all gradients together, so that ‖g‖₂ <= max_norm, in place: g ← g·min(1, max_norm / (‖g‖₂ + 1e-6)).

    As ``torch.nn.utils.clip_grad_norm_``, which refuses ordinary tensors beside DTensors, and DTensors of two meshes.
    All ranks call it alike, after the last backward of the step (and after ``GradScaler.unscale_``).

    Args:
        parameters: of a backbone, as it is or under DDP or FSDP2, and of parallel heads. What is sharded counts with
            all of its shards, what every rank holds alike counts once. Parameters without a gradient are left out.
        max_norm: > 0.

    Returns:
        ‖g‖₂ before, a scalar in float64, the same on all ranks: that of one process with the global batch.

    Raises:
        ValueError, TypeError: ``max_norm`` is no positive number.
        DistributedError: another rank is gone.

    See also: ``torch.nn.utils.clip_grad_norm_``, for parameters that are not spread over ranks.

    Example:
        >>> import torch
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.distributed import class_mesh, clip_grad_norm_, parallelize
        >>> backbone, head = torch.nn.Linear(8, 4), parallelize(ArcFaceLoss(100, 4), class_mesh())
        >>> head(backbone(torch.randn(2, 8)), torch.tensor([1, 2])).backward()
        >>> norm = clip_grad_norm_([*backbone.parameters(), *head.parameters()], max_norm=1e-3)
        >>> bool(norm > 1e-3), bool(clip_grad_norm_(head.parameters(), 1.0) <= 1e-3)
        (True, True)
    """
    check_number("max_norm", max_norm, above=0.0)
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    # By what the norms are summed over: ranks must agree on it, whether or not they all have gradients.
    parts: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        part = parts.setdefault(_shards(parameter), [])
        if parameter.grad is not None:
            part.append(_placed_alike(parameter.grad, parameter))
    device = parameters[0].device if parameters else None
    total = torch.zeros((), dtype=torch.float64, device=device)
    for shards, gradients in parts.items():
        square = get_total_norm(gradients).to(total) ** 2
        for mesh, dimension in shards:
            square = comm.all_reduce(square, mesh.get_group(dimension))
        total += square
    total = total.sqrt()
    factor = (max_norm / (total + 1e-6)).clamp_max(1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            local(parameter.grad).mul_(factor)
    return total


def _shards(parameter: Tensor) -> tuple[tuple[Any, int], ...]:
    """The mesh dimensions over which the parts of a DTensor are spread."""
    placements = enumerate(getattr(parameter, "placements", ()))
    return tuple((parameter.device_mesh, dim) for dim, place in placements if not place.is_replicate())  # type: ignore[attr-defined]


def _placed_alike(gradient: Any, parameter: Any) -> Tensor:
    """This rank's part of a gradient, of sums that are still to be taken too."""
    return local(gradient.redistribute(placements=parameter.placements) if _shards(parameter) else gradient)
