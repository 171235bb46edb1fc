"""Mixup: a network sees weighted means of two pictures, and the loss the same mean of the losses of both labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixed:
    """Pictures share·a + (1 − share)·b (B, channels, H, W) float32, and the labels (B,) of the b."""

    images: Tensor
    other_labels: Tensor
    share: float


def mix(images: Tensor, labels: Tensor, alpha: float, generator: np.random.Generator) -> Mixed:
    """Mix each picture (B, channels, H, W) with a random other of its batch; one share ~ Beta(alpha, alpha) a batch.

    Train with share·loss(labels) + (1 − share)·loss(other_labels).

    Source: Zhang et al., mixup: beyond empirical risk minimization, ICLR 2018, eq. 1 and figure 1a.
    """
    share = float(generator.beta(alpha, alpha))
    partner = torch.from_numpy(generator.permutation(len(images))).to(images.device)
    pixels = images.float()
    return Mixed(torch.lerp(pixels[partner], pixels, share), labels[partner], share)
