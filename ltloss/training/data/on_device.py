"""Images that lie on the device, so that no batch crosses the bus and none is assembled one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ltloss.training.data.images import ArrayImages, ImageSource


@dataclass(frozen=True)
class DeviceImages:
    """An ``ImageSource`` whose pixels are a uint8 tensor (N, channels, H, W) on a device."""

    source: ArrayImages
    pixels: Tensor

    @property
    def labels(self) -> np.ndarray:
        """Labels (N,) int64, on the CPU."""
        return self.source.labels

    @cached_property
    def device_labels(self) -> Tensor:
        """Labels (N,) int64 on the device."""
        return torch.from_numpy(self.source.labels).to(self.pixels.device)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The C class names that the labels count."""
        return self.source.class_names

    @property
    def names(self) -> Sequence[str]:
        """One display name per image."""
        return self.source.names

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.source.shape

    def __len__(self) -> int:
        """Images in the source."""
        return len(self.source)

    def batch(self, indices: np.ndarray) -> Tensor:
        """Pixels (B, channels, height, width) uint8 of the images at indices (B,), on the device."""
        return self.pixels[torch.from_numpy(indices).to(self.pixels.device)]

    def parts(self, parts: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels (B, channels, height, width) and labels (B,) on the device of each part; one copy for all indices."""
        order = torch.from_numpy(np.concatenate(parts)).to(self.pixels.device)
        for indices in torch.split(order, [len(part) for part in parts]):
            yield self.pixels[indices], self.device_labels[indices]

    def image(self, index: int) -> Image.Image:
        """The image as it is stored."""
        return self.source.image(index)

    def subset(self, indices: np.ndarray) -> DeviceImages:
        """The images at indices."""
        return DeviceImages(self.source.subset(indices), self.batch(indices))


def on_device(source: ImageSource, device: torch.device) -> ImageSource:
    """The images of a source in memory, as a tensor on ``device``; a folder's images stay where they are."""
    if not isinstance(source, ArrayImages):
        return source
    return DeviceImages(source, source.batch(np.arange(len(source))).to(device))
