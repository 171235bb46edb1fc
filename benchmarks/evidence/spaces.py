"""The inputs of the classifiers in ``benchmarks.evidence.classifiers``: fixed features, or images.

Features come from a file, or from a network that was trained on the problem before, with cosine softmax at its default
scale, and then frozen. They are centred and whitened as ``LongTailClassifier`` does it, except in the space "as they
are".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.evidence.heads import METHODS, trained
from benchmarks.evidence.problems import DATA, Data, for_validation, whitened

_RATE = 0.16  # learning rate, times √D, of the prototypes with which a network is trained before


class Training(NamedTuple):
    """How long a network is trained together with its prototypes, or prototypes over the features of a file."""

    batch: int
    passes: int


TRAININGS = {
    "omniglot": Training(128, 20),
    "fashion": Training(128, 5),
    "icons": Training(512, 4),
    "icons40": Training(256, 2),
    "toponyms": Training(512, 3),  # of EVERY town
}
EVERY = {"every": 7}


class Space(NamedTuple):
    """The inputs of a classifier, and how it is trained.

    ``before``: how the network was trained whose features these are. ``learns``: the network learns with the
    classifier. ``fewer``: shorter lists of values to tune, where a training is long. ``options``: of the problem.
    """

    title: str
    problem: str
    batch: int
    passes: int
    trial: int = 0  # passes while values are tuned; 0: as many
    before: Training | None = None
    learns: bool = False
    whiten: bool = True
    fewer: Mapping[str, Sequence[float]] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})


_RATES = {"lr": (0.08, 0.16, 0.32)}
SPACES = {
    "whitened": Space("icons, whitened", "icons", *TRAININGS["icons"], trial=2),
    "as they are": Space("icons, as they are", "icons", *TRAININGS["icons"], trial=2, whiten=False),
    "20 x 20 pixels": Space(
        *("icons, 20 x 20 pixels", "icons40", *TRAININGS["icons40"]),
        learns=True,
        fewer={**_RATES, "scale": (16.0, 32.0), "weight_decay": (0.01, 0.1)},
    ),
    "toponyms": Space(
        *("toponyms, one town of seven", "toponyms", *TRAININGS["toponyms"]),
        learns=True,
        fewer={**_RATES, "scale": (8.0, 16.0, 32.0)},
        options=EVERY,
    ),
    "omniglot network": Space("Omniglot-LT", "omniglot", 256, 20, before=TRAININGS["omniglot"]),
    "fashion network": Space("Fashion-MNIST-LT", "fashion", 128, 4, before=TRAININGS["fashion"]),
    "icons40 network": Space("icons, 20 x 20 pixels", "icons40", 512, 4, before=TRAININGS["icons40"]),
    "toponyms network": Space(
        *("toponyms, one town of seven", "toponyms", 512, 4), before=TRAININGS["toponyms"], options=EVERY
    ),
}
IMAGES = "20 x 20 pixels"
NETWORKS = tuple(name for name, space in SPACES.items() if space.before is not None)


@cache
def features(folder: Path, name: str, split: str) -> Data:
    """The samples of a space before whitening; for ``split`` "validation" the test samples are training samples."""
    space = SPACES[name]
    if split == "validation":
        data = for_validation(space.problem, folder, **space.options)
    else:
        data = DATA[space.problem](folder, **space.options)
    return data if space.before is None else frozen(data, space.before)


@cache
def data(folder: Path, name: str, split: str) -> Data:
    """The samples of a space as a classifier gets them: whitened, or scaled to a mean length of 1."""
    space, found = SPACES[name], features(folder, name, split)
    if space.learns:
        return found
    if space.whiten:
        return whitened(found)
    length = found.train.norm(dim=1).mean()
    return found._replace(train=found.train / length, test=found.test / length)


def frozen(data: Data, before: Training) -> Data:
    """The samples as features of a network that was trained on them, with seed 0."""
    network, _ = trained(METHODS["cosine"], {"lr": _RATE}, data, *before, seed=0)
    network.eval()
    with torch.no_grad():
        train, test = (torch.cat([network(part) for part in x.split(512)]) for x in (data.train, data.test))
    return data._replace(train=train, test=test, network=nn.Identity, augment="none")
