"""RandAugment: two random operations on every image, with Pillow."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

OPERATIONS_PER_IMAGE, LEVEL = 2, 9 / 30  # N and M of Cubuk et al. for ImageNet

_Operation = Callable[[Image.Image, float], Image.Image]  # of an image and a level in [-1, 1]


def _moved(image: Image.Image, *rows: float) -> Image.Image:
    """The image whose pixel (x, y) is the original's at (a·x + b·y + c, d·x + e·y + f), black outside it."""
    return image.transform(image.size, Image.Transform.AFFINE, rows, resample=Image.Resampling.BILINEAR)


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> _Operation:
    return lambda image, level: kind(image).enhance(1 + 0.9 * level)


# Level 1 is the end of the paper's ranges: rotation by 30°, shear by 0.3, translation by 150 of 331 pixels, 4 bits,
# all greys inverted, enhancement by 1.9 (or 0.1).
OPERATIONS: dict[str, _Operation] = {
    "identity": lambda image, level: image,
    "autocontrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
    "rotate": lambda image, level: image.rotate(30 * level, resample=Image.Resampling.BILINEAR),
    "solarize": lambda image, level: ImageOps.solarize(image, round(256 * (1 - abs(level)))),
    "posterize": lambda image, level: ImageOps.posterize(image, 8 - round(4 * abs(level))),
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear-x": lambda image, level: _moved(image, 1, 0.3 * level, -0.15 * level * image.height, 0, 1, 0),
    "shear-y": lambda image, level: _moved(image, 1, 0, 0, 0.3 * level, 1, -0.15 * level * image.width),
    "translate-x": lambda image, level: _moved(image, 1, 0, round(150 / 331 * level * image.width), 0, 1, 0),
    "translate-y": lambda image, level: _moved(image, 1, 0, 0, 0, 1, round(150 / 331 * level * image.height)),
}


def rand_augment(images: Tensor, generator: torch.Generator, workers: int = 1) -> Tensor:
    """Images (B, 1 or 3, H, W) uint8 on the CPU, each after two operations drawn evenly, at level 9 of 30.

    Operations with a direction take it at random. The result depends only on ``generator``, which is on the CPU, not on
    the number of threads.

    Source: Cubuk et al., RandAugment: practical automated data augmentation with a reduced search space, NeurIPS 2020,
    figure 2, with the 14 operations of its section 3.1.
    """
    kinds, operations = (len(images), OPERATIONS_PER_IMAGE), list(OPERATIONS.values())
    drawn = torch.randint(len(operations), kinds, generator=generator).tolist()
    levels = (LEVEL * (2 * torch.randint(2, kinds, generator=generator) - 1)).tolist()

    def changed(pixels: np.ndarray, chosen: list[int], strengths: list[float]) -> np.ndarray:
        image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
        for index, level in zip(chosen, strengths, strict=True):
            image = operations[index](image, level)
        return np.asarray(image).reshape(pixels.shape)

    found = list(_pool(workers).map(changed, images.numpy().transpose(0, 2, 3, 1), drawn, levels))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="augment")
