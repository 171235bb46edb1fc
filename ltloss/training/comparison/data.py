"""The images of a comparison: training and test, or training and validation, where the test split stays unread."""

from __future__ import annotations

import dataclasses
import json
import zlib
from functools import lru_cache

import numpy as np
import torch

from ltloss.errors import UserError
from ltloss.training.data.images import ArrayImages, ImageSource
from ltloss.training.data.on_device import on_device
from ltloss.training.data.splits import keep_per_class
from ltloss.training.run.prepare import TrainingData, limited, load_split, prepare_data, run_config
from ltloss.training.run.settings import Settings

_DATA_SETTINGS = (
    "data",
    "imbalance",
    "image_size",
    "channels",
    "limit_per_class",
    "limit_test",
    "data_seed",
    "workers",
)
VALIDATION_FRACTION = 0.2


def comparison_data(settings: Settings, validation_per_class: int | None, device: torch.device) -> TrainingData:
    """Both splits on the device: training and test, or where a number is given training and validation.

    For a validation split so many images of every class are held out of the training file, from a class that has
    fewer than twice as many only half of it; then the long tail is cut from the rest.
    """
    facts = {name: getattr(settings, name) for name in _DATA_SETTINGS}
    data = _loaded(json.dumps({**facts, "data_seed": settings.split_seed}), validation_per_class, str(device))
    return dataclasses.replace(data, config=dataclasses.replace(data.config, settings=settings))


@lru_cache(maxsize=1)
def _loaded(data_settings: str, validation_per_class: int | None, device: str) -> TrainingData:
    settings = Settings(**json.loads(data_settings))
    data = prepare_data(settings) if validation_per_class is None else _held_out(settings, validation_per_class)
    place = torch.device(device)
    return dataclasses.replace(data, train=on_device(data.train, place), test=on_device(data.test, place))


def _held_out(settings: Settings, per_class: int) -> TrainingData:
    whole = load_split(settings, "train")
    validation = validation_indices(whole.labels, per_class, settings.split_seed)
    rest = whole.subset(np.setdiff1d(np.arange(len(whole)), validation))
    # What is left may be too small for the whole imbalance: 12 images a class cannot span 15.
    largest = int(np.bincount(rest.labels).max())
    train = limited(rest, dataclasses.replace(settings, imbalance=min(settings.imbalance, largest)), "train")
    return TrainingData(train, whole.subset(validation), run_config(settings, train))


def validation_indices(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Sorted indices of ``per_class`` random images of each class of labels (N,), at most half of any class."""
    held = np.minimum(per_class, np.bincount(labels) // 2)
    if not held.any():
        raise UserError("no class has two training images, so none can be held out to tune on; leave --tune out")
    return keep_per_class(labels, held, seed, "validation")


def default_validation(labels: np.ndarray) -> int:
    """Images of every class to hold out of a training file with labels (N,): a fifth of the smallest, at least 1."""
    return max(1, round(VALIDATION_FRACTION * int(np.bincount(labels).min())))


def fingerprint(source: ImageSource) -> str:
    """A checksum of labels and pixels; of the labels and names for images in files."""
    labels = zlib.crc32(np.ascontiguousarray(source.labels).data)
    if isinstance(source, ArrayImages):
        return f"{zlib.crc32(np.ascontiguousarray(source.images).data, labels):08x}"
    return f"{zlib.crc32(json.dumps(source.names).encode(), labels):08x}"
