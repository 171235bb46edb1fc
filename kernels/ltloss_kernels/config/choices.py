"""Ways to work that no GPU has measured yet: off, unless tried (``python -m benchmarks.loss_gpu --stage tiles``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

__all__ = ["NAMES", "Choice", "tried", "trying"]

# one wave: slabs of the backward for which the product for the prototypes is just under whole waves of its tiles.
# parts of K: the product for few features over parts of the classes at a time, so that it has more tiles than 4 or 8.
# slabs of the cache: for few samples slabs that stay in it. Always so in a CUDA graph, where launches cost the host
# nothing; a step at (256, 1M, 512) has some 60 slabs.
Choice = Literal["one wave", "parts of K", "slabs of the cache"]
NAMES: tuple[Choice, ...] = get_args(Choice)
_tried: set[str] = set()


@contextmanager
def trying(name: Choice) -> Iterator[None]:
    """Within the block the choice is on."""
    _tried.add(name)
    try:
        yield
    finally:
        _tried.discard(name)


def tried(name: Choice) -> bool:
    """Whether the choice is on."""
    return name in _tried
