"""Training recipes: named sets of settings, each of which can be overridden."""

from __future__ import annotations

from typing import Any

from ltloss.errors import UserError, nearest

RECIPES: dict[str, dict[str, Any]] = {
    # The usual recipe for CIFAR-10-LT and CIFAR-100-LT, from Cao et al., Learning imbalanced datasets with
    # label-distribution-aware margin loss, NeurIPS 2019: 5 epochs of warm-up, steps at epochs 160 and 180.
    "cifar-lt": {
        "backbone": "resnet32",
        "embedding_size": 64,
        "embedding_norm": False,
        "epochs": 200,
        "batch_size": 128,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 2e-4,
        "decay_all": True,
        "warmup": 0.025,
        "schedule": "0.8:0.01,0.9:0.0001",
        "augment": "crop-flip",
        "beta": 0.9999,
    },
    # Trains in minutes on one core, on images of 28 x 28 pixels. No flips: a mirrored character is another one.
    "small": {
        "backbone": "small-cnn",
        "embedding_size": 128,
        "embedding_norm": True,
        "epochs": 20,
        "batch_size": 128,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "warmup": 0.05,
        "schedule": "cosine",
        "augment": "crop",
        "crop_pad": 2,
        "beta": 0.9999,
    },
    # A linear head over embeddings of 1,655 classes: the best of three rates on held-out samples (docs/cli.md).
    "embeddings": {
        "head": "linear",
        "epochs": 10,
        "batch_size": 128,
        "lr": 0.2,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "warmup": 0.05,
        "schedule": "cosine",
    },
}


def recipe(name: str, optimizer: str = "sgd") -> dict[str, Any]:
    """The settings of the recipe ``name``; UserError for an unknown name.

    Its lr and weight decay are for SGD, and are left out for another ``optimizer``.
    """
    if name not in RECIPES:
        raise UserError(f"--recipe {name} is unknown; {nearest(name, RECIPES)}")
    foreign = () if optimizer == "sgd" else ("lr", "weight_decay")
    return {setting: value for setting, value in RECIPES[name].items() if setting not in foreign}


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products, with which autocast makes training two to three times faster."""
    import torch

    looks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # torch has no public name for these yet
    return any(getattr(torch.cpu, look, lambda: False)() for look in looks)
