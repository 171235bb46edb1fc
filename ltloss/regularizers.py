"""The regularisers of source A on vectors: the mean angle of L2 and the functions g(‖x‖) of L3.

Each is one formula, which all backends and the reference share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ltloss._validation import check_choice, check_dense, shown
from ltloss.margins import arccos
from ltloss.numerics import compute_dtype

__all__ = ["FeatureNormKind", "mean_angle", "norm_penalty"]

FeatureNormKind = Literal["inverse", "magface", "ring", "hinge", "neglog"]

_SHORTEST = 1e-6  # lower bound of the length, for 1/r and log r; below it the penalty is constant

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
    """:func:`ltloss.functional.feature_norm_penalty`, averaged over the ``counted`` (N,) samples, or over all."""
    if counted is not None:
        features = features.masked_fill(~counted[:, None], 0.0)  # ignored rows may hold NaN
    length = torch.linalg.vector_norm(features, dim=1, dtype=compute_dtype(features)).clamp_min(_SHORTEST)
    if callable(kind):
        values = kind(length)
        if not isinstance(values, Tensor) or values.shape != length.shape:
            raise ValueError(
                f"kind must map lengths {shown(length)} to a tensor of the same shape; got {shown(values)}"
            )
        check_dense("kind of lengths", values, integers=False)
    else:
        check_choice("kind", kind, get_args(FeatureNormKind))
        values = _KINDS[kind](length, radius)
    if counted is None:
        return values.sum() / max(1, values.numel())
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp_min(1)


def mean_angle(cosine: Tensor, weights: Tensor) -> Tensor:
    """Minus the weighted mean angle, −Σ ω_i·arccos(cos_i)/Σ ω_i, of cosines (R,) with weights (R,) >= 0.

    Returns:
        A scalar in radians, in the dtype of ``cosine``; 0 if all weights are 0.

    Example:
        >>> import torch
        >>> from ltloss.regularizers import mean_angle
        >>> mean_angle(torch.zeros(2), torch.tensor([1.0, 3.0]))
        tensor(-1.5708)
    """
    total = weights.sum()
    return -(weights / torch.where(total == 0.0, 1.0, total) * arccos(cosine)).sum()
