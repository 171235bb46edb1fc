"""Classified images: what every consumer asks of them, in memory (arrays) or decoded on demand (files)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image

from ltloss.errors import ImageError, UserError
from ltloss.training.data.decode import open_image, to_pixels

Split = Literal["train", "test", "all"]
Size = int | tuple[int, int] | None  # pixels: the side of a square, (height, width), or that of the data
SMALLEST_SIZE = 4  # what --image-size demands: the backbones pool images twice


class ImageSource(Protocol):
    """What training, evaluation and prediction consume."""

    @property
    def labels(self) -> np.ndarray:
        """Labels (N,) int64; -1 where unknown."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The C class names that the labels count."""

    @property
    def names(self) -> Sequence[str]:
        """One display name per image."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what ``batch`` returns."""

    def __len__(self) -> int:
        """Images in the source."""

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        """Pixels (B, channels, height, width) uint8 of the images at indices (B,)."""

    def image(self, index: int) -> Image.Image:
        """The original image, for a gallery."""

    def subset(self, indices: np.ndarray) -> ImageSource:
        """The same source with only the images at indices."""


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory.

    Args:
        images: (N, H, W) or (N, H, W, 1 or 3) uint8.
        labels: (N,) int64.
        class_names: C names.
        names: display names of the N images.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    names: Sequence[str]

    @cached_property
    def _channels_first(self) -> np.ndarray:
        images = self.images
        return images[:, None] if images.ndim == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self._channels_first.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        """Images in the source."""
        return len(self.images)

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        """Pixels (B, channels, height, width) uint8 of the images at indices (B,)."""
        return torch.from_numpy(self._channels_first[indices])

    def image(self, index: int) -> Image.Image:
        """The image as it is stored."""
        return Image.fromarray(self.images[index].squeeze())

    def subset(self, indices: np.ndarray) -> ArrayImages:
        """The images at indices."""
        names = [self.names[i] for i in indices]
        return ArrayImages(self.images[indices], self.labels[indices], self.class_names, names)

    def reshaped(self, size: Size, channels: int | None) -> ArrayImages:
        """The images at another size or number of channels; self where nothing changes."""
        target = target_shape(self.shape, size, channels, len(self))
        if target == self.shape:
            return self
        pixels = [to_pixels(self.image(i), target).transpose(1, 2, 0) for i in range(len(self))]
        return ArrayImages(np.stack(pixels), self.labels, self.class_names, self.names)


@dataclass(frozen=True)
class FolderImages:
    """Images in files, decoded on demand by ``workers`` threads. ``skipped`` holds (name, reason) of those left out."""

    folder: Path
    names: Sequence[str]  # relative to folder
    labels: np.ndarray
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    workers: int = 4

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.workers, thread_name_prefix="decode")

    def __len__(self) -> int:
        """Images in the source."""
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        """The image at full size; UserError where the file was damaged or removed since it was checked."""
        try:
            return open_image(self.folder / self.names[index])
        except ImageError as reason:
            raise UserError(
                f"{self.folder / self.names[index]} {reason}; it changed since it was checked, restore it"
            ) from None

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        """Pixels (B, channels, height, width) uint8 of the images at indices (B,)."""
        pixels = list(self._pool.map(lambda i: to_pixels(self.image(i), self.shape), indices))
        return torch.from_numpy(np.stack(pixels) if pixels else np.empty((0, *self.shape), np.uint8))

    def subset(self, indices: np.ndarray) -> FolderImages:
        """The images at indices."""
        names = [self.names[i] for i in indices]
        return FolderImages(
            self.folder, names, self.labels[indices], self.class_names, self.shape, self.skipped, self.workers
        )


def machine_memory() -> float:
    """Bytes that this process can have: those of the machine, or of its control group; infinity where unknown."""
    known: list[float] = []
    with suppress(AttributeError, ValueError, OSError):  # there is no sysconf on Windows
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(ValueError, OSError):  # "max" where there is no limit
        known.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(known, default=math.inf)


def target_shape(shape: tuple[int, int, int], size: Size, channels: int | None, held: int) -> tuple[int, int, int]:
    """(channels, height, width) of the images to use, of which ``held`` are in memory at once."""
    height, width = (size, size) if isinstance(size, int) else size or shape[1:]
    if min(height, width) < SMALLEST_SIZE:
        raise UserError(
            f"the images are {width} x {height} pixels, each side must be at least {SMALLEST_SIZE}; "
            "enlarge them with --image-size"
        )
    target = channels or shape[0], height, width
    needed, memory = held * math.prod(target), machine_memory()
    if needed > memory:
        raise UserError(
            f"{held} images of {' x '.join(map(str, target))} pixels take at least {needed:,} bytes, more than the "
            f"{memory:,} of this machine; use a smaller --image-size"
        )
    return target
