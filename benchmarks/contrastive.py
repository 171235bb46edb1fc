"""``python -m benchmarks.contrastive``: in-batch contrastive losses beside the dense formula, in time and memory.

Forward and backward run in float32, on two batches of width 256 with gradients (a queue has none), with a learned
scale. Every case is checked against float64, then timed in fresh processes, in turns. Memory is what one step takes
above what the process held before it, gradients included. The rows go to ``results/contrastive-cpu.csv``.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from benchmarks.evidence.pages import markdown_table
from benchmarks.peers import TOLERANCE, Shape, errors_of
from benchmarks.step.measure import MIB, Found, Goal, Row, Work, in_turns, limit_memory, verdict
from benchmarks.timing import RESULTS, paired_ratio, peak_extra_bytes, stamp, write_rows
from ltloss import contrastive, reference

BATCHES = (1024, 4096, 8192, 16384)
WIDTH = 256
CHECKED = 1100  # samples of a check: more than one tile
LABELS = 100
FIRST_SCALE, LAST_SCALE = 1 / 0.07, 100.0  # CLIP's initial scale, and its upper bound
GOALS = {("info_nce: ltloss", 8192): Goal(0.6, 0.1)}


@dataclass
class Inputs:
    """Two batches (N, D), labels (N,) of each, scale and bias; the same numbers for every case."""

    a: Tensor
    b: Tensor
    labels: Tensor
    queue_labels: Tensor
    numbers: list[Tensor] = field(default_factory=list)  # scale, bias

    @classmethod
    def draw(cls, case: Case, n: int, seed: int = 0) -> Inputs:
        """Draw float32 inputs; all but a queue require gradients."""
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(n, WIDTH, generator=generator) for _ in range(2))
        labels = torch.randint(LABELS, (2, n), generator=generator)
        inputs = cls(a, b, *labels, [torch.tensor(case.scale), torch.tensor(-10.0)])
        for leaf in (a, b, *inputs.numbers):
            leaf.requires_grad_(leaf is not b or case.loss != "supervised_contrastive")
        return inputs

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that require gradients."""
        return [one for one in (self.a, self.b, *self.numbers) if one.requires_grad]

    def double(self) -> Inputs:
        """A copy in float64."""
        a, b, *numbers = (
            one.detach().double().requires_grad_(one.requires_grad) for one in (self.a, self.b, *self.numbers)
        )
        return Inputs(a, b, self.labels, self.queue_labels, numbers)


@dataclass(frozen=True)
class Case:
    """A loss in one of its implementations, at a scale."""

    loss: str
    form: str
    build: Callable[[], Callable[[Inputs], Tensor]]  # raises ImportError if the form is not installed
    scale: float = FIRST_SCALE

    @property
    def name(self) -> str:
        """The name in reports."""
        return f"{self.loss}: {self.form}"


def _of(module: Any, loss: str) -> Callable[[Inputs], Tensor]:
    function = getattr(module, loss)
    if loss == "supervised_contrastive":
        return lambda x: function(x.a, x.labels, x.b, x.queue_labels, scale=x.numbers[0])
    if loss == "siglip_loss":
        return lambda x: function(x.a, x.b, scale=x.numbers[0], bias=x.numbers[1])
    return lambda x: function(x.a, x.b, scale=x.numbers[0])


def _open_clip(name: str, numbers: int) -> Callable[[Inputs], Tensor]:
    loss = getattr(importlib.import_module("open_clip.loss"), name)()
    unit = torch_functional.normalize
    return lambda x: loss(unit(x.a), unit(x.b), *x.numbers[:numbers])


def _cases(loss: str) -> list[Case]:
    return [
        Case(loss, "ltloss", lambda: _of(contrastive, loss)),
        Case(loss, "dense", lambda: _of(reference, loss)),
    ]


CASES = {
    case.name: case
    for case in (
        *_cases("info_nce"),
        Case("info_nce", "open_clip", lambda: _open_clip("ClipLoss", 1)),
        Case("info_nce", "ltloss, s = 100", lambda: _of(contrastive, "info_nce"), LAST_SCALE),
        *_cases("siglip_loss"),
        Case("siglip_loss", "open_clip", lambda: _open_clip("SigLipLoss", 2)),
        *_cases("supervised_contrastive"),
    )
}


def _step(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    _drop_gradients(inputs)
    value = loss(inputs)
    value.backward()
    return value.detach()


def _drop_gradients(inputs: Inputs) -> None:
    for leaf in inputs.leaves:
        leaf.grad = None


def check(case: Case, n: int = CHECKED) -> float:
    """Largest relative error (by norm) of loss and gradients against float64; raises if it is not just rounding."""
    inputs = Inputs.draw(case, n)
    exact = inputs.double()
    pairs = [(_step(case.build(), inputs), _step(_of(reference, case.loss), exact))]
    pairs += [
        (ours.grad, law.grad)
        for ours, law in zip(inputs.leaves, exact.leaves, strict=True)
        if ours.grad is not None and law.grad is not None  # info_nce has no bias
    ]
    error = max(float((ours.double() - law).norm() / law.norm()) for ours, law in pairs)
    if not error < TOLERANCE[torch.float32]:
        raise RuntimeError(f"{case.name}: relative error {error:.1e} exceeds {TOLERANCE[torch.float32]}; not timed")
    return error


def take(work: Work, steps: int, most_bytes: int | None) -> tuple[list[float], int, tuple[float, float]]:
    """Seconds of each step after the first, bytes of one more step, and the loss; for a process of its own."""
    limit_memory(most_bytes)
    case = CASES[work.case]
    inputs, loss = Inputs.draw(case, work.shape.n), case.build()
    value, seconds = float(_step(loss, inputs)), []
    for _ in range(steps):
        start = time.perf_counter()
        _step(loss, inputs)
        seconds.append(time.perf_counter() - start)
    peak = peak_extra_bytes(lambda: _step(loss, inputs), lambda: _drop_gradients(inputs))
    return seconds, peak, (value, value)


def rows_of(works: Sequence[Work], found: Sequence[Found]) -> list[Row]:
    """A row with time and memory of each, and ratios to the dense form of the same loss and batch size."""
    dense = {(CASES[work.case].loss, work.shape.n): one for work, one in zip(works, found, strict=True) if _dense(work)}
    rows = []
    for work, one in zip(works, found, strict=True):
        case = CASES[work.case]
        row: Row = {"loss": case.loss, "form": case.form, "N": work.shape.n, "D": work.shape.d}
        rows.append(row)
        if one.reason:
            row["note"] = one.reason
            continue
        row["median_ms"] = f"{1e3 * statistics.median(one.medians):.1f}"
        row["min_ms"], row["max_ms"] = (f"{1e3 * end:.1f}" for end in (min(one.seconds), max(one.seconds)))
        row["repeats"], row["extra_mib"] = len(one.seconds), f"{one.peak_bytes / MIB:.1f}"
        base = dense.get((case.loss, work.shape.n))
        if base is not None and not base.reason:
            ratios = paired_ratio(one.medians, base.medians), one.peak_bytes / base.peak_bytes
            row |= {"time_ratio": f"{ratios[0]:.3f}", "memory_ratio": f"{ratios[1]:.3f}"}
            row["goal"] = verdict(*ratios, GOALS.get((work.case, work.shape.n)))
    return rows


def _dense(work: Work) -> bool:
    return CASES[work.case].form == "dense"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for the documentation."""
    lines = [["", "", "N", "ms", "time / dense", "MiB", "memory / dense"]]
    for row in rows:
        cells = ("median_ms", "time_ratio", "extra_mib", "memory_ratio")
        lines.append([row["loss"], row["form"], str(row["N"]), *(str(row.get(cell, "")) for cell in cells)])
    return markdown_table(lines)


def main() -> None:
    """Check, measure, show and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each case (default 3)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process (default 3)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="batch sizes")
    parser.add_argument("--output", type=Path, default=RESULTS / "contrastive-cpu.csv", help="CSV to write")
    arguments = parser.parse_args()
    common, errors = stamp(), errors_of({name: partial(check, case) for name, case in CASES.items()}, "open_clip_torch")
    works = [Work(name, Shape(n, n, WIDTH)) for n in arguments.batches for name in errors]
    measured = rows_of(works, in_turns(works, arguments.rounds, arguments.steps, take))
    rows = [{**common, **row, "relative_error": errors[work.case]} for work, row in zip(works, measured, strict=True)]
    for row in rows:
        print("  ".join(f"{name} {row[name]}" for name in measured[0] if row.get(name)), flush=True)
    write_rows(rows, arguments.output)
    print(f"wrote {arguments.output}; `python -m benchmarks.pictures` shows it")


if __name__ == "__main__":
    main()
