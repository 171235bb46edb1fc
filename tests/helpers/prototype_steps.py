"""The training that the tests of the optimizers of prototypes share."""

from __future__ import annotations

from typing import Any

import torch

from ltloss.testing import problem


def train_steps(module: Any, optimizer: Any, seeds: range, scheduler: Any = None) -> None:
    """A step on a random batch for each seed."""
    for seed in seeds:
        features, _, labels = problem(12, *module.weight.shape, seed=seed, dtype=torch.float32)
        optimizer.zero_grad()
        module(features, labels).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
