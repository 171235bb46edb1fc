"""Stage 3: the fastest tile at each shape, and whether the untried choices of the kernels are faster.

Winners are printed as lines of ``ltloss_kernels/config/tile_table.py``. All results are rows of
``results/<device>-tiles.csv``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.loss_gpu.times import Bench
from benchmarks.peers import Shape
from benchmarks.timing import write_rows

Row = dict[str, Any]

# Shapes where tiles differ most: bound by the epilogue, by the product, by both, by memory.
SHAPES = (
    Shape(8192, 131_072, 512),
    Shape(8192, 131_072, 128),
    Shape(8192, 131_072, 256),
    Shape(8192, 131_072, 4096),
    Shape(256, 1_000_000, 512),
    Shape(64, 1_000_000, 512),
)


def measure(bench: Bench, shapes: Sequence[Shape], output: Path | None) -> None:
    """Rank every candidate until the deadline; print and write each result as soon as it is known."""
    rows: list[Row] = []
    for shape in shapes:
        for found in (_tiles, _choices):
            for row in found(bench, shape):
                rows.append({**bench.stamp, "N": shape.n, "C": shape.c, "D": shape.d, **row})
                if output is not None:
                    write_rows(rows, output)
            bench.device.release()


def _tiles(bench: Bench, shape: Shape) -> Iterator[Row]:
    from ltloss.tools import tune_tiles  # needs Triton

    sizes = (shape.n, shape.c, shape.d)
    for kernel in get_args(tune_tiles.Kernel):
        if bench.deadline.left() <= 0:
            bench.tell(f"tiles: left out for time: {kernel} at {shape}")
            return
        ranking = tune_tiles.rank(kernel, *sizes, bench.dtype, bench.device.kind, bench.repeats)
        best, today = ranking[0], next(one for one in ranking if one.today)
        if best.problem:
            line = f"no tile works for {kernel}"
        else:
            line = tune_tiles.table_line(kernel, best, bench.dtype, shape.n, shape.d)
        bench.tell(tune_tiles.show(kernel, sizes, ranking), f"{line}  # {shape}: {best.milliseconds:.3f} ms, "
                   f"today's {today.milliseconds:.3f} ms")  # fmt: skip
        for place, timing in enumerate(ranking, 1):
            tile = "x".join(str(size) for size in timing.tile)
            yield {"what": kernel, "choice": tile, "place": place, "ms": f"{timing.milliseconds:.4f}",
                   "note": timing.problem or ("today" if timing.today else "")}  # fmt: skip


def _choices(bench: Bench, shape: Shape) -> Iterator[Row]:
    """Time a step with each of ``config.choices``, in turn with the step as it is today."""
    from ltloss_kernels.config import choices

    from ltloss.functional import margin_cross_entropy

    if bench.deadline.left() <= 0:
        bench.tell(f"choices: left out for time: {shape}")
        return
    torch.manual_seed(0)
    make = partial(torch.randn, device=bench.device.kind, dtype=bench.dtype, requires_grad=True)
    features, prototypes = make(shape.n, shape.d), make(shape.c, shape.d)
    labels = torch.randint(shape.c, (shape.n,), device=bench.device.kind)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(margin_cross_entropy(features, prototypes, labels), (features, prototypes))

    def chosen(name: str) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            with choices.trying(name):
                return step()

        return run

    expected = step()
    ways = {"today": step, **{name: chosen(name) for name in choices.NAMES}}
    for name, way in ways.items():
        for one, other in zip(way(), expected, strict=True):
            if not float((one.double() - other.double()).norm()) <= 1e-2 * float(other.double().norm()):
                raise RuntimeError(f"{name} computes something else at {shape}")
    del expected
    times = bench.device.time(lambda: None, bench.product, list(ways.values()), bench.repeats)
    for name, milliseconds in zip(ways, times.steps, strict=True):
        median = statistics.median(milliseconds)
        bench.tell(f"step at {shape}, {name}: {median:.3f} ms")
        yield {"what": "step", "choice": name, "ms": f"{median:.4f}"}
