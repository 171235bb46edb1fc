"""Batches of images or embeddings, read ahead by a thread, and the augmentation of images."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltloss.training.data.embeddings import Source
from ltloss.training.data.images import DeviceImages


@dataclass(frozen=True)
class Batch:
    """Images (B, channels, H, W) uint8 or embeddings (B, D) of floats, with labels (B,) int64."""

    images: Tensor
    labels: Tensor


def batch_count(samples: int, batch_size: int, ranks: int = 1) -> int:
    """How many batches ``batches`` makes of so many samples.

    Every rank has at least two samples of each batch if possible, because batch normalisation cannot use one alone.
    """
    return max(1, min(-(-samples // batch_size), samples // (2 * ranks)))


def batches(
    source: Source,
    batch_size: int,
    order: np.ndarray | None = None,
    *,
    ahead: int = 3,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """Every sample once, in ``order`` or as they come, about ``batch_size`` at a time.

    Batches are of equal size, give or take one, and have at least two samples if the source has. A thread reads up to
    ``ahead`` batches while the caller computes; an error there is raised here. With several ``ranks``, each rank gets
    its part of every batch.
    """
    if order is None:
        order = np.arange(len(source))
    if not len(order):
        return iter(())
    parts = np.array_split(order, batch_count(len(order), batch_size, ranks))
    if ranks > 1:
        parts = [np.array_split(part, ranks)[rank] for part in parts]
    if isinstance(source, DeviceImages):
        return (Batch(images, labels) for images, labels in source.parts(parts))
    return _read_ahead(source, parts, ahead)


def _read_ahead(source: Source, parts: list[np.ndarray], ahead: int) -> Iterator[Batch]:
    def read(part: np.ndarray) -> Batch:
        return Batch(source.batch(part), torch.from_numpy(source.labels[part]))

    pool, left = ThreadPoolExecutor(1, thread_name_prefix="read-ahead"), iter(parts)
    try:
        reading = deque(pool.submit(read, part) for part in islice(left, max(ahead, 1)))
        while reading:
            batch = reading.popleft().result()
            reading.extend(pool.submit(read, part) for part in islice(left, 1))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def augment(images: Tensor, kind: str, generator: torch.Generator, pad: int | None = None) -> Tensor:
    """Augmented images (B, channels, H, W): each is shifted at random, and for "crop-flip" mirrored at random.

    The shift is at most ``pad`` pixels, by default an eighth of the side (4 pixels of 32); uncovered pixels are black.
    For "none", and for embeddings, nothing changes. ``generator`` is on the CPU, so that all devices get the same.
    """
    if kind == "none" or images.dim() == 2:  # embeddings
        return images
    count, channels, height, width = images.shape
    pads = (round(height / 8), round(width / 8)) if pad is None else (pad, pad)
    top, left = (torch.randint(0, 2 * pad + 1, (count, 1), generator=generator) for pad in pads)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if kind == "crop-flip":
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (pads[1], pads[1], pads[0], pads[0]))
    device = images.device
    sample = torch.arange(count, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    return padded[sample, channel, rows.to(device).view(count, 1, -1, 1), columns.to(device).view(count, 1, 1, -1)]
