"""The searches among prototypes on the Triton kernels; see :mod:`ltloss.triton_backend`, of which this is a part."""

from __future__ import annotations

import ltloss_kernels
import torch
from torch import Tensor

from ltloss.runtime import current_workspace
from ltloss.triton_backend import on_device, widened

__all__ = ["nearest_prototype", "nearest_prototype_backward", "top_k"]


@on_device
def nearest_prototype(prototypes: Tensor, rows: Tensor | None, exact: bool) -> tuple[Tensor, Tensor]:
    """See :func:`ltloss.ops.nearest_prototype`."""
    count = prototypes.shape[0] if rows is None else rows.shape[0]
    if prototypes.shape[0] == 1 or count == 0:
        alone = torch.full((count,), -1, dtype=torch.int64, device=prototypes.device)
        return alone.to(torch.float32), alone
    return ltloss_kernels.nearest_prototype(widened(prototypes), rows, "ieee" if exact else None)


@on_device
def nearest_prototype_backward(grad_cosine: Tensor, prototypes: Tensor, rows: Tensor | None, index: Tensor) -> Tensor:
    """See :func:`ltloss.ops.nearest_prototype_backward`."""
    if prototypes.shape[0] == 1 or index.numel() == 0:
        return torch.zeros(prototypes.shape, dtype=prototypes.dtype, device=prototypes.device)
    return ltloss_kernels.nearest_prototype_gradient(grad_cosine, widened(prototypes), rows, index).to(prototypes.dtype)


@on_device
def top_k(features: Tensor, prototypes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See :func:`ltloss.ops.top_k`."""
    if features.shape[0] == 0:
        return features.new_empty((0, k), dtype=torch.float32), features.new_empty((0, k), dtype=torch.int64)
    return ltloss_kernels.top_k(widened(features), widened(prototypes), k, current_workspace())
