"""Labelled images: in memory (arrays), on a device, or decoded on demand (files)."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ltloss.errors import ImageError, UserError
from ltloss.training.data.decode import open_image, to_pixels

if TYPE_CHECKING:
    from typing_extensions import Self

Split = Literal["train", "test", "all"]
Size = int | tuple[int, int] | None  # in pixels: the side of a square, (height, width), or None for that of the data
SMALLEST_SIZE = 4  # least side in pixels: the backbones pool images twice


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory.

    Args:
        images: (N, H, W) or (N, H, W, 1 or 3) uint8.
        labels: (N,) int64; -1 where unknown.
        class_names: names (C,) by label.
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

    def batch(self, indices: np.ndarray) -> Tensor:
        """Pixels (B, channels, height, width) uint8 of the images at indices (B,)."""
        return torch.from_numpy(self._channels_first[indices])

    def checksum(self, start: int = 0) -> int:
        """CRC-32 of the pixels as they are stored, continued from ``start``."""
        return zlib.crc32(np.ascontiguousarray(self.images).data, start)

    def image(self, index: int) -> Image.Image:
        """The image as it is stored."""
        pixels = self.images[index]
        return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)

    def subset(self, indices: np.ndarray) -> Self:
        """The images at indices."""
        names = [self.names[i] for i in indices]
        return replace(self, images=self.images[indices], labels=self.labels[indices], names=names)

    def reshaped(self, size: Size, channels: int | None) -> Self:
        """The images at another size or number of channels; self where nothing changes."""
        target = target_shape(self.shape, size, channels, len(self))
        if target == self.shape:
            return self
        pixels = [to_pixels(self.image(i), target).transpose(1, 2, 0) for i in range(len(self))]
        return replace(self, images=np.stack(pixels))


@dataclass(frozen=True)
class DeviceImages(ArrayImages):
    """Images that are also on a device, so that batches are neither copied there nor assembled image by image.

    ``pixels`` is a uint8 tensor (N, channels, H, W) on the device.
    """

    pixels: Tensor

    @cached_property
    def device_labels(self) -> Tensor:
        """Labels (N,) int64 on the device."""
        return torch.from_numpy(self.labels).to(self.pixels.device)

    def batch(self, indices: np.ndarray) -> Tensor:
        """Pixels (B, channels, height, width) uint8 of the images at indices (B,), on the device."""
        return self.pixels[torch.from_numpy(indices).to(self.pixels.device)]

    def parts(self, parts: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels (B, channels, height, width) and labels (B,) of each part, on the device; indices are copied once."""
        order = torch.from_numpy(np.concatenate(parts)).to(self.pixels.device)
        for indices in torch.split(order, [len(part) for part in parts]):
            yield self.pixels[indices], self.device_labels[indices]

    def subset(self, indices: np.ndarray) -> Self:
        """The images at indices."""
        return replace(super().subset(indices), pixels=self.batch(indices))


@dataclass(frozen=True)
class FolderImages:
    """Images in files, decoded on demand by ``workers`` threads. ``skipped`` has (name, reason) of unreadable files."""

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

    def batch(self, indices: np.ndarray) -> Tensor:
        """Pixels (B, channels, height, width) uint8 of the images at indices (B,)."""
        pixels = list(self._pool.map(lambda i: to_pixels(self.image(i), self.shape), indices))
        return torch.from_numpy(np.stack(pixels) if pixels else np.empty((0, *self.shape), np.uint8))

    def checksum(self, start: int = 0) -> int:
        """CRC-32 of the names and of the bytes of the files, continued from ``start``."""
        files = self._pool.map(lambda name: zlib.crc32((self.folder / name).read_bytes()), self.names)
        return zlib.crc32(json.dumps([*zip(self.names, files, strict=True)]).encode(), start)

    def subset(self, indices: np.ndarray) -> Self:
        """The images at indices."""
        return replace(self, names=[self.names[i] for i in indices], labels=self.labels[indices])


ImageSource = ArrayImages | FolderImages


def on_device(source: ArrayImages, device: torch.device) -> DeviceImages:
    """Copy images in memory to a tensor on ``device``; both are kept."""
    pixels = source.batch(np.arange(len(source))).to(device)
    return DeviceImages(source.images, source.labels, source.class_names, source.names, pixels)


def machine_memory() -> float:
    """Bytes of memory of the machine, or of this process's control group if less; infinity if unknown."""
    known: list[float] = []
    with suppress(AttributeError, ValueError, OSError):  # there is no sysconf on Windows
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(ValueError, OSError):  # "max" where there is no limit
        known.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(known, default=math.inf)


def target_shape(shape: tuple[int, int, int], size: Size, channels: int | None, held: int) -> tuple[int, int, int]:
    """(channels, height, width) of the images to use; UserError if too small, or if ``held`` of them exceed memory."""
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
