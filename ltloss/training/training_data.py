"""The pictures of one run: loaded, limited, long-tailed, and measured for normalisation."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass

import numpy as np
import torch

import ltloss

from .batches import batches
from .config import RunConfig, Settings
from .datasets import ImageSource, Split, load_data
from .longtail import keep_per_class, long_tailed_subset
from .seeds import numpy_generator

_NORMALISATION_PICTURES = 4096


@dataclass(frozen=True)
class TrainingData:
    """Both splits and the configuration that follows from them."""

    train: ImageSource
    test: ImageSource
    config: RunConfig


def prepare_data(settings: Settings) -> TrainingData:
    """Load both splits as the settings say. The long tail and the limit per class act on the training split only."""
    seed = settings.seed
    train = load_data(
        settings.data,
        split="train",
        image_size=settings.image_size,
        channels=settings.channels,
        seed=seed,
        workers=settings.workers,
    )
    channels, *size = train.shape
    test = load_data(
        settings.data,
        split="test",
        image_size=(size[0], size[1]),
        channels=channels,
        seed=seed,
        workers=settings.workers,
    )
    train, test = limited(train, settings, "train"), limited(test, settings, "test")
    mean, std = _normalisation(train, seed)
    config = RunConfig(
        settings=settings,
        class_names=train.class_names,
        class_counts=tuple(np.bincount(train.labels, minlength=len(train.class_names)).tolist()),
        image_shape=train.shape,
        mean=mean,
        std=std,
        versions={
            "ltloss": ltloss.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )
    return TrainingData(train, test, config)


def limited(source: ImageSource, settings: Settings, split: Split) -> ImageSource:
    """What a run uses of a split of its data: the long tail and the limits of its settings. `all` is left whole."""
    seed = settings.seed
    if split == "train":
        if settings.limit_per_class is not None:
            counts = np.full(len(source.class_names), settings.limit_per_class)
            source = source.subset(keep_per_class(source.labels, counts, seed, "limit"))
        return source.subset(long_tailed_subset(source.labels, settings.imbalance, seed))
    if split == "test" and settings.limit_test is not None:
        kept = numpy_generator(seed, "limit test").permutation(len(source))[: settings.limit_test]
        return source.subset(np.sort(kept))
    return source


def _normalisation(source: ImageSource, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of (at most 4096 random) pictures with pixels in [0, 1]."""
    sample = numpy_generator(seed, "normalisation").permutation(len(source))[:_NORMALISATION_PICTURES]
    # Sums of integers: every machine finds the same mean, so a run can be resumed on another one.
    total, squares = torch.zeros(2, source.shape[0], dtype=torch.int64)
    for batch in batches(source, 512, np.sort(sample)):
        pixels = batch.images.transpose(0, 1).flatten(1).long()
        total += pixels.sum(1)
        squares += pixels.square().sum(1)
    count = len(sample) * source.shape[1] * source.shape[2]
    mean = [value / count for value in total.tolist()]
    variance = [value / count - m * m for value, m in zip(squares.tolist(), mean, strict=True)]
    # One grey level is the least that pictures which all look the same can vary by.
    return tuple(m / 255 for m in mean), tuple(math.sqrt(max(v, 1.0)) / 255 for v in variance)
