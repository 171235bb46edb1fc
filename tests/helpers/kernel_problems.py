"""Problems on the device that the kernels run on, and what is compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from ltloss import reference
from ltloss.testing import Outcome, Problem, outcome, problem, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Sums of some hundred float32 products, times a scale of 30 in the exponent.
TOLERANCE = 5e-6


FORWARD_TILE, GRADIENT_TILE, SEARCH_TILE = (16, 32, 16), (16, 16, 16), (16, 16, 16)


@contextmanager
def tiny_tiles() -> Iterator[None]:
    """Tiles so small that little problems cross many boundaries of them."""
    from ltloss_kernels import prototype_search
    from ltloss_kernels.config import tile_table as tiles

    chosen = {"forward_tile": FORWARD_TILE, "gradient_tile": GRADIENT_TILE, "search_tile": SEARCH_TILE}
    with ExitStack() as stack:
        for name, tile in chosen.items():
            value = tiles.Tile(*tile, 4, 2)
            stack.enter_context(mock.patch.object(tiles, name, return_value=value))
        stack.enter_context(mock.patch.object(tiles, "SAMPLE_ROWS", (16, 32)))
        stack.enter_context(mock.patch.object(prototype_search, "GROUP", 2))
        stack.enter_context(mock.patch.object(prototype_search, "CHUNK", 4))
        yield


def kernel_problem(
    n: int = 37,
    c: int = 70,
    d: int = 19,
    *,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    ignored: bool = True,
    seed: int = 0,
) -> Problem:
    """A random problem on the device; by default no size is a multiple of a tile's."""
    given = problem(n, c, d, ignored=ignored, seed=seed)
    return Problem(
        given.features.to(DEVICE, dtypes[0]), given.prototypes.to(DEVICE, dtypes[1]), given.labels.to(DEVICE)
    )


def exact_outcome(given: Problem, upstream: torch.Tensor | None = None, **options: Any) -> Outcome:
    """The float64 law on the same, already rounded numbers, on the CPU."""
    wide = Problem(given.features.double().cpu(), given.prototypes.double().cpu(), given.labels.cpu())
    options = {name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    upstream = None if upstream is None else upstream.cpu().double()
    return outcome(wide, upstream, loss=reference.margin_cross_entropy, **options)


def assert_close(ours: Outcome, exact: Outcome, tolerance: float = TOLERANCE, smallest_size: float = 0.0) -> None:
    for name, one, other in zip(Outcome._fields, ours, exact, strict=True):
        error = relative_error(one.cpu(), other, smallest_size)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def options_on_device(options: dict[str, Any]) -> dict[str, Any]:
    return {name: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
