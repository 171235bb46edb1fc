"""Distances and miners of pytorch-metric-learning, as its losses take them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltloss.reference import cosines, direction

__all__ = ["found_cosines", "miner_weights", "unknown_distance"]


def found_cosines(distance: Any, width: int) -> tuple[bool, bool]:
    """Whether a distance computes cosines to unit prototypes, and whether those times the length of the embedding.

    By what it returns, which holds for distances of anyone.
    """
    rows = torch.arange(1.0, 5.0 * width + 1.0, dtype=torch.float64, device="cpu").sin().view(5, width)
    queries, prototypes = rows[:2], direction(rows[2:])
    expected = cosines(queries, prototypes)
    found = distance(queries, prototypes) if getattr(distance, "p", 2) == 2 else expected.new_full((), math.nan)
    lengths = torch.linalg.vector_norm(queries, dim=1, keepdim=True)
    same, scaled = (found.shape == e.shape and torch.allclose(found, e) for e in (expected, expected * lengths))
    return same, scaled


def unknown_distance(distance: Any, expected: str) -> ValueError:
    """That of a distance which is none of those a loss computes."""
    options = [
        f"{name}={getattr(distance, name)}" for name in ("normalize_embeddings", "p", "power") if name in vars(distance)
    ]
    return ValueError(
        f"distance must be None or compute {expected}; got {type(distance).__name__}({', '.join(options)})"
    )


def miner_weights(indices_tuple: Sequence[Tensor] | None, losses: Tensor) -> Tensor | float:
    """(N,) how often a miner names each sample, divided by how often it names the most frequent one; 1 without one."""
    if indices_tuple is None or all(len(indices) == 0 for indices in indices_tuple):
        return 1.0
    chosen = torch.cat(tuple(indices_tuple)).to(losses.device)
    counts = torch.bincount(chosen, minlength=losses.shape[0]).to(losses.dtype)
    return counts / counts.max()
