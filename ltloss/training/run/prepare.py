"""The images or embeddings of a run: load them, apply limits and long tail, and measure mean and deviation."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass, replace

import numpy as np
import torch

import ltloss
from ltloss.errors import UserError
from ltloss.losses.defaults import FROZEN_SCALE
from ltloss.training.data.batches import batches
from ltloss.training.data.embeddings import ArrayEmbeddings, Source
from ltloss.training.data.images import ImageSource, Split
from ltloss.training.data.sources import DECODED_AT_ONCE, load_data
from ltloss.training.data.splits import keep_per_class, long_tailed_subset, stratified_split
from ltloss.training.model.registry import takes_option
from ltloss.training.run.run_config import RunConfig
from ltloss.training.run.settings import SETTINGS, Settings
from ltloss.training.seeds import numpy_generator

_NORMALISATION_IMAGES = 4096
_OF_IMAGES, _OF_EMBEDDINGS = ("backbone", "image_root", "image_size", "channels", "augment", "crop_pad"), ("head",)
_DEFAULT_SIZE = SETTINGS["embedding_size"].default


@dataclass(frozen=True)
class TrainingData:
    """Both splits, and the configuration that follows from them."""

    train: Source
    test: Source
    config: RunConfig
    validation: Source | None = None  # held out of the training split


def prepare_data(settings: Settings, width: tuple[int, ...] | None = None) -> TrainingData:
    """Load both splits as the settings say, embeddings (N, D) only of ``width`` (D,) if given.

    The long tail and the limit per class act on the training split only.
    """
    train = load_split(settings, "train", width)
    check_applies(settings, train.shape)
    test = load_split(settings, "test", train.shape)
    (train, validation), test = _training_parts(train, settings), apply_limits(test, settings, "test")
    return TrainingData(train, test, run_config(settings, train), validation)


def load_split(settings: Settings, split: Split, shape: tuple[int, ...] | None = None) -> Source:
    """One whole split of the data; images have ``shape`` (channels, height, width) if given, else that of the settings.

    Raises UserError if ``shape`` is (D,) and the data are not embeddings of this length, or if it is that of images and
    the data are embeddings.
    """
    resized = shape is not None and len(shape) == 3
    source = load_data(
        settings.data,
        split=split,
        image_size=(shape[1], shape[2]) if resized else settings.image_size,  # type: ignore[index]
        channels=shape[0] if resized else settings.channels,  # type: ignore[index]
        image_root=settings.image_root,
        seed=settings.split_seed,
        workers=settings.workers,
    )
    if shape is not None and source.shape != shape:
        raise UserError(f"{settings.data} holds {_words(source.shape)}, {_words(shape)} were expected; give other data")
    return source


def _words(shape: tuple[int, ...]) -> str:
    return f"embeddings of {shape[0]} features" if len(shape) == 1 else f"images of shape {shape}"


def without_use(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the settings that do not apply to samples of this shape."""
    return _OF_IMAGES if len(shape) == 1 else _OF_EMBEDDINGS


def check_applies(settings: Settings, shape: tuple[int, ...]) -> None:
    """Raise UserError for a setting of images if the data are embeddings, or of embeddings if they are images."""
    embeddings, width = len(shape) == 1, shape[0]
    for name in without_use(shape):
        if (value := getattr(settings, name)) != SETTINGS[name].default:
            flag, (use, held) = name.replace("_", "-"), ("images", "embeddings")[:: 1 if embeddings else -1]
            raise UserError(f"--{flag} {value} is for {use}, and {settings.data} holds {held}; leave it out")
    if embeddings and settings.head == "linear" and settings.embedding_size not in (width, _DEFAULT_SIZE):
        raise UserError(
            f"--embedding-size {settings.embedding_size}: a linear head leaves the {width} features of {settings.data} "
            "as they are; leave it out, or take --head mlp"
        )


def with_frozen_scale(settings: Settings) -> Settings:
    """Settings of a run of embeddings, with the scale for a linear head, which leaves them as they are."""
    open_scale = "scale" not in settings.all_loss_options and takes_option(settings.loss, "scale")
    return replace(settings, scale=FROZEN_SCALE) if settings.head == "linear" and open_scale else settings


def run_config(settings: Settings, train: Source) -> RunConfig:
    """The configuration of a run whose training split is ``train``."""
    if isinstance(train, ArrayEmbeddings):
        mean, std = train.moments()
        settings = with_frozen_scale(settings)
    else:
        mean, std = _normalisation(train, settings.split_seed)
    return RunConfig(
        settings=settings,
        class_names=train.class_names,
        class_counts=tuple(np.bincount(train.labels, minlength=len(train.class_names)).tolist()),
        image_shape=train.shape,
        mean=mean,
        std=std,
        versions={"ltloss": ltloss.__version__, "torch": torch.__version__, "python": platform.python_version()},
    )


def apply_limits(source: Source, settings: Settings, split: Split) -> Source:
    """The part of a split that a run uses, by the long tail and limits of its settings; "all" stays whole."""
    seed = settings.split_seed
    if split == "train":
        return _training_parts(source, settings)[0]
    if split == "test" and settings.limit_test is not None:
        kept = numpy_generator(seed, "limit test").permutation(len(source))[: settings.limit_test]
        return source.subset(np.sort(kept))
    return source


def _training_parts(source: Source, settings: Settings) -> tuple[Source, Source | None]:
    """The part of the training split that a run is trained on, and the part that it holds out for validation."""
    seed = settings.split_seed
    if settings.limit_per_class is not None:
        counts = np.full(len(source.class_names), settings.limit_per_class)
        source = source.subset(keep_per_class(source.labels, counts, seed, "limit"))
    source = source.subset(long_tailed_subset(source.labels, settings.imbalance, seed))
    if not settings.validation_fraction:
        return source, None
    kept, held = stratified_split(source.labels, settings.validation_fraction, seed, "validation")
    if not len(held):
        raise UserError("--validation-fraction: no class has two training images, so none is held out; leave it out")
    return source.subset(kept), source.subset(held)


def _normalisation(source: ImageSource, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, for pixels in [0, 1], of at most 4096 random images."""
    sample = numpy_generator(seed, "normalisation").permutation(len(source))[:_NORMALISATION_IMAGES]
    # Sums of integers: every machine finds the same mean, so a run can be resumed on another one.
    total, squares = torch.zeros(2, source.shape[0], dtype=torch.int64)
    for batch in batches(source, DECODED_AT_ONCE, np.sort(sample)):
        pixels = batch.images.transpose(0, 1).flatten(1).long()
        total += pixels.sum(1)
        squares += pixels.square().sum(1)
    count = len(sample) * source.shape[1] * source.shape[2]
    mean = [value / count for value in total.tolist()]
    variance = [value / count - m * m for value, m in zip(squares.tolist(), mean, strict=True)]
    # A deviation of at least one grey level, in case all images look the same.
    return tuple(m / 255 for m in mean), tuple(math.sqrt(max(v, 1.0)) / 255 for v in variance)
