"""The expected calibration error: how far the probability of a prediction can be believed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BINS", "binned", "calibration_error"]

BINS = 15


def binned(confidence: Tensor, right: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums over the bins (m − 1)/15 < confidence ≤ m/15, m = 1 … 15; 0 and NaN belong to the first.

    Args:
        confidence: (N,) probabilities of the predictions, float32 or float64.
        right: (N,) bool, whether the prediction is right.
        weights: (N,); None: 1 each.

    Returns:
        (3, 15) float64: of the weights, of those of right predictions, and of weight·confidence. Sums of batches add.

    Source: Guo et al., On calibration of modern neural networks, ICML 2017, section 2: I_m = ((m − 1)/M, m/M].
    """
    confidence = confidence.double()
    edges = torch.arange(1, BINS, dtype=torch.float64, device=confidence.device) / BINS
    bins = torch.bucketize(confidence.nan_to_num(nan=0.0), edges)
    each = torch.ones_like(confidence) if weights is None else weights.double()
    rows = torch.stack([each, each * right, each * confidence])
    return torch.zeros(3, BINS, dtype=torch.float64).index_add_(1, bins.cpu(), rows.cpu())


def calibration_error(sums: Tensor) -> float | None:
    """Σ_m |right_m − confidence_m| / Σ_m weight_m of the sums (3, 15) of :func:`binned`; None of no weight.

    Source: Guo et al., On calibration of modern neural networks, ICML 2017, eq. 3.
    """
    weight, right, confidence = sums
    total = float(weight.sum())
    return float((right - confidence).abs().sum()) / total if total else None
