"""Mixup: a network sees weighted means of two samples, and the loss the same mean of the losses of both labels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def mix(
    images: Tensor,
    labels: Tensor,
    alpha: float,
    generator: np.random.Generator,
    partners: np.random.Generator | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Mix each image (B, channels, H, W), or embedding (B, D), with a random other; one fraction ~ Beta(alpha, alpha).

    ``partners`` draws the others, by default ``generator`` too. Ranks whose ``generator`` is to stay alike need one of
    their own, because what a permutation draws depends on B.

    Returns fraction·images + (1 − fraction)·others in their shape, float32, the labels (B,) of the others, and the
    fraction. Train with fraction·loss(labels) + (1 − fraction)·loss(other_labels).

    Source: Zhang et al., mixup: beyond empirical risk minimization, ICLR 2018, eq. 1 and figure 1a.
    """
    fraction = float(generator.beta(alpha, alpha))
    partner = torch.from_numpy((partners or generator).permutation(len(images))).to(images.device)
    pixels = images.float()
    return torch.lerp(pixels[partner], pixels, fraction), labels[partner], fraction
