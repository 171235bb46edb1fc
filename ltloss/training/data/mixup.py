"""Mixup: a network sees weighted means of two images, and the loss the same mean of the losses of both labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixed:
    """Images fraction·a + (1 − fraction)·b (B, channels, H, W) float32, and the labels (B,) of the b."""

    images: Tensor
    other_labels: Tensor
    fraction: float


def mix(images: Tensor, labels: Tensor, alpha: float, generator: np.random.Generator) -> Mixed:
    """Mix each image (B, channels, H, W) with a random other of its batch; one fraction ~ Beta(alpha, alpha) a batch.

    Train with fraction·loss(labels) + (1 − fraction)·loss(other_labels).

    Source: Zhang et al., mixup: beyond empirical risk minimization, ICLR 2018, eq. 1 and figure 1a.
    """
    fraction = float(generator.beta(alpha, alpha))
    partner = torch.from_numpy(generator.permutation(len(images))).to(images.device)
    pixels = images.float()
    return Mixed(torch.lerp(pixels[partner], pixels, fraction), labels[partner], fraction)
