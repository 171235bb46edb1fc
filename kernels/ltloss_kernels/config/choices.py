"""Options of the kernels that no GPU has measured yet.

All are off unless tried, as ``python -m benchmarks.loss_gpu --stage tiles`` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

__all__ = ["NAMES", "Choice", "tried", "trying"]

# one wave: slabs of the backward for which the tiles of the product dZᵀ·X fill just under a whole number of waves.
# parts of K: for few samples, the product dZ·W is cut along the classes, so that it has more tiles than 4 or 8.
# slabs of the cache: for few samples, slabs stay in the second-level cache. A step at (256, 1M, 512) has some 60, so it
# is for CUDA graphs, whose launches cost the host nothing. Warm up with it too: a capture cannot load a kernel.
Choice = Literal["one wave", "parts of K", "slabs of the cache"]
NAMES: tuple[Choice, ...] = get_args(Choice)
_tried: set[str] = set()


@contextmanager
def trying(name: Choice) -> Iterator[None]:
    """Turn the choice on within the block."""
    _tried.add(name)
    try:
        yield
    finally:
        _tried.discard(name)


def tried(name: Choice) -> bool:
    """Whether the choice is on."""
    return name in _tried
