"""Random streams: every one is derived from (seed, purpose, epoch).

No generator lives longer than an epoch. So a checkpoint holds no generator states, and a resumed run draws exactly what
the uninterrupted one would have drawn.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(seed: int, purpose: str, epoch: int = 0) -> int:
    """A 63-bit seed (torch takes no more) for one purpose in one epoch."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), epoch])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def numpy_generator(seed: int, purpose: str, epoch: int = 0) -> np.random.Generator:
    """A NumPy generator for one purpose in one epoch."""
    return np.random.default_rng(derived_seed(seed, purpose, epoch))


def torch_generator(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """A CPU generator of torch for one purpose in one epoch."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, epoch))


@contextmanager
def torch_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators (initialisation, dropout) within the block, and restore them after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
