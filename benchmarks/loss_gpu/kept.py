"""Forward and backward with and without kept exponentials, at shapes where either may be faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

from benchmarks.loss_gpu.search import BF16, SearchCase
from benchmarks.peers import Inputs, Shape
from ltloss import use_workspace
from ltloss.functional import margin_cross_entropy

_SMALL = (Shape(12, 40, 16),)
_SHAPES = (
    Shape(256, 1_000_000, 512),
    Shape(512, 1_000_000, 512),
    Shape(8192, 131_072, 512),
    Shape(8192, 131_072, 1024),
)
_ROOM = 256 << 20  # bytes of the usual workspace, beside what is kept


def _step(keep: bool, device: str, shape: Shape, dtype: torch.dtype) -> Callable[[], None]:
    _checked(device, dtype)
    inputs = Inputs.draw(shape, device=device, dtype=dtype)
    room = _ROOM + keep * 3 * shape.n * shape.c

    def step() -> None:
        with use_workspace(room, keep_exponentials=keep):
            loss = margin_cross_entropy(
                inputs.features, inputs.prototypes, inputs.labels, scale=64.0, angular_margin=0.5
            )
        with use_workspace(_ROOM):
            loss.backward()
        inputs.drop_gradients()  # so that they count as memory of the next step, not of what was there before

    return step


@cache
def _checked(device: str, dtype: torch.dtype) -> None:
    """Raise RuntimeError if keeping changes a gradient by more than the rounding of what is kept."""
    inputs, found = Inputs.draw(_SMALL[0], device=device, dtype=dtype), []
    for keep in (False, True):
        inputs.drop_gradients()
        with use_workspace(_ROOM, keep_exponentials=keep):
            margin_cross_entropy(inputs.features, inputs.prototypes, inputs.labels, scale=64.0).backward()
        found.append([one.grad.float() for one in (inputs.features, inputs.prototypes) if one.grad is not None])
    for plain, kept in zip(*found, strict=True):
        if not float((kept - plain).abs().max()) <= 2.0**-6 * float(plain.abs().max()):
            raise RuntimeError("keeping exponentials changes a gradient by more than their rounding; not timed")


def kept_cases(small: bool) -> Iterator[SearchCase]:
    """The same step twice at each shape; memory is what it takes beside the inputs, gradients included."""
    for shape in _SMALL if small else _SHAPES:
        for keep in (False, True):
            phase = "step, kept" if keep else "step, not kept"
            yield SearchCase(phase, shape, BF16, "ltloss", partial(_step, keep), 8, "exponentials kept or not")
