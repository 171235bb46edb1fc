"""Stage 3: the fastest tile at each shape, and whether the untried choices of the kernels are faster.

Winners are printed as lines of ``ltloss_kernels/config/tile_table.py``. All results are rows of
``results/<device>-tiles.csv``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch
from ltloss_kernels.config import choices
from ltloss_kernels.config.tile_table import Tile
from torch import Tensor

from benchmarks.loss_gpu.apart import Answer, Worker
from benchmarks.loss_gpu.measure import Deadline, Device
from benchmarks.loss_gpu.times import Bench
from benchmarks.peers import Shape
from benchmarks.timing import write_rows
from ltloss.functional import margin_cross_entropy
from ltloss.tools import tune_tiles

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
    """Rank every candidate until the deadline; print and write each result as soon as it is known.

    Each is timed in another process: no GPU has run most of them, and one that crashes or hangs costs itself only.
    """
    rows: list[Row] = []
    worker = Worker(bench.device.kind, apart=bench.device.is_cuda)
    for shape in shapes:
        for found in (_tiles, _choices):
            for row in found(bench, shape, worker):
                rows.append({**bench.stamp, "N": shape.n, "C": shape.c, "D": shape.d, **row})
                if output is not None:
                    write_rows(rows, output)
    worker.close()


def _failed(bench: Bench, what: str, answer: Answer) -> str:
    """The problem of an answer, after telling it; that the time was too short is no mistake."""
    if answer.problem:
        bench.tell(f"{what}: {answer.problem}")
        bench.failed |= not answer.late
    return answer.problem


def _against_today(
    kernel: tune_tiles.Kernel, shape: Shape, dtype: torch.dtype, device: str, repeats: int, *tried: Tile
) -> list[tune_tiles.Timing]:
    with mock.patch.object(tune_tiles, "CANDIDATES", tried):
        return tune_tiles.rank(kernel, shape.n, shape.c, shape.d, dtype, device, repeats)


def _tiles(bench: Bench, shape: Shape, worker: Worker) -> Iterator[Row]:
    sizes = (shape.n, shape.c, shape.d)
    for kernel in get_args(tune_tiles.Kernel):
        timings: list[tune_tiles.Timing] = []
        for tried in ((), *((tile,) for tile in tune_tiles.CANDIDATES)):
            if bench.deadline.left() <= 0:
                bench.tell(f"tiles: left out for time: {kernel} at {shape}, from {tried or 'today'} on")
                break
            given = (kernel, shape, bench.dtype, bench.device.kind, bench.repeats, *tried)
            answer = worker.do(bench.deadline, _against_today, *given)
            if problem := _failed(bench, f"{kernel} at {shape}, {tried or 'today'}", answer):
                yield {"what": kernel, "choice": _name(*tried), "ms": "inf", "note": problem}
                if not tried:  # the others are compared with it
                    break
            else:
                timings += [one for one in answer.value if one.today != bool(tried)]
        if timings:
            yield from _ranked(bench, kernel, sizes, sorted(timings, key=lambda timing: timing.milliseconds))


def _name(*tile: Tile) -> str:
    return "x".join(str(size) for size in tile[0]) if tile else "today"


def _ranked(
    bench: Bench, kernel: tune_tiles.Kernel, sizes: tuple[int, int, int], ranking: list[tune_tiles.Timing]
) -> Iterator[Row]:
    """Tell the ranking and its winner, and return its rows."""
    best, today = ranking[0], next(one for one in ranking if one.today)
    if best.problem:
        line = f"no tile works for {kernel}"
    else:
        line = tune_tiles.table_line(kernel, best, bench.dtype, sizes[0], sizes[2])
    bench.tell(tune_tiles.show(kernel, sizes, ranking), f"{line}  # {Shape(*sizes)}: {best.milliseconds:.3f} ms, "
               f"today's {today.milliseconds:.3f} ms")  # fmt: skip
    for place, timing in enumerate(ranking, 1):
        yield {"what": kernel, "choice": _name(timing.tile), "place": place, "ms": f"{timing.milliseconds:.4f}",
               "note": timing.problem or ("today" if timing.today else "")}  # fmt: skip


def _choices(bench: Bench, shape: Shape, worker: Worker) -> Iterator[Row]:
    """Time a step with each of ``config.choices``, in turn with the step as it is today."""
    told = False
    for name in choices.NAMES:
        if bench.deadline.left() <= 0:
            bench.tell(f"choices: left out for time: {shape}, from {name} on")
            return
        given = (name, shape, bench.dtype, bench.device.kind, bench.repeats)
        answer = worker.do(bench.deadline, _with_choice, *given)
        if problem := _failed(bench, f"step at {shape}, {name}", answer):
            yield {"what": "step", "choice": name, "note": problem}
            continue
        today, median = answer.value
        if not told:
            yield {"what": "step", "choice": "today", "ms": f"{today:.4f}"}
        told = True
        bench.tell(f"step at {shape}, {name}: {median:.3f} ms, today's {today:.3f} ms")
        yield {"what": "step", "choice": name, "ms": f"{median:.4f}", "today_ms": f"{today:.4f}"}


def _with_choice(
    name: choices.Choice, shape: Shape, dtype: torch.dtype, device: str, repeats: int
) -> tuple[float, float]:
    """Median milliseconds of a step as it is today and with the choice; raises if that gives something else."""
    bench = Bench(Device(device), Deadline(0.0), None, dtype)
    torch.manual_seed(0)
    make = partial(torch.randn, device=device, dtype=dtype, requires_grad=True)
    features, prototypes = make(shape.n, shape.d), make(shape.c, shape.d)
    labels = torch.randint(shape.c, (shape.n,), device=device)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(margin_cross_entropy(features, prototypes, labels), (features, prototypes))

    def chosen() -> tuple[Tensor, ...]:
        with choices.trying(name):
            return step()

    for one, other in zip(chosen(), step(), strict=True):
        if not float((one.double() - other.double()).norm()) <= 1e-2 * float(other.double().norm()):
            raise RuntimeError("computes something else")
    today, median = map(
        statistics.median, bench.device.time(lambda: None, bench.product, [step, chosen], repeats).steps
    )
    return today, median
