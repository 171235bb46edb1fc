"""The functions g(‖x‖) that L3 of the long-tail loss can use. The reference shares them: they are one formula each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ltloss._validation import check_choice
from ltloss.chunked.logsumexp import compute_dtype

__all__ = ["FeatureNormKind", "norm_penalty"]

FeatureNormKind = Literal["inverse", "magface", "ring", "hinge", "neglog"]

_SHORTEST = 1e-6  # 1/r and log r need a length; below this, the penalty is constant

_KINDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "inverse": lambda r, _: 1 / r,
    "magface": lambda r, u: 1 / r + r / u**2,
    "ring": lambda r, big_r: (r - big_r) ** 2,
    "hinge": lambda r, big_r: (big_r - r).clamp_min(0.0),
    "neglog": lambda r, _: -r.log(),
}


def norm_penalty(
    features: Tensor,
    kind: FeatureNormKind | Callable[[Tensor], Tensor],
    radius: float,
    counted: Tensor | None = None,
) -> Tensor:
    """See :func:`ltloss.functional.feature_norm_penalty`; the mean is over the ``counted`` (N,) samples, or all."""
    if counted is not None:
        features = features.masked_fill(~counted[:, None], 0.0)  # what is ignored may hold NaN
    length = torch.linalg.vector_norm(features, dim=1, dtype=compute_dtype(features)).clamp_min(_SHORTEST)
    if callable(kind):
        values = kind(length)
        if not isinstance(values, Tensor) or values.shape != length.shape:
            given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"kind must map lengths {tuple(length.shape)} to a tensor of the same shape; got {given}")
    else:
        check_choice("kind", kind, get_args(FeatureNormKind))
        values = _KINDS[kind](length, radius)
    if counted is None:
        return values.sum() / max(1, values.numel())
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp_min(1)
