"""Stage 2: forward and backward of the loss and of its peers, and the searches, each beside a large library product.

Every row says which properties failed in stage 1. A provider that is wrong at a shape is not timed there. On Hopper,
rows and the end of the stage say which goals are met.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_gpu import goals
from benchmarks.loss_gpu.apart import Worker
from benchmarks.loss_gpu.kept import kept_cases
from benchmarks.loss_gpu.measure import Deadline, Device, TooSlow
from benchmarks.loss_gpu.search import SearchCase, search_cases
from benchmarks.loss_gpu.updates import update_cases
from benchmarks.peers import ON_GPU, Inputs, Provider, Shape, check_step, exact_step
from benchmarks.timing import write_rows
from ltloss._files import write_file
from ltloss.errors import in_one_line

Row = dict[str, Any]

LAUNCH_BOUND = Shape(256, 1000, 512)
TINY = (Shape(12, 40, 16), Shape(5, 33, 8))  # for --device cpu

# Operations per N·C·D: a product for the forward; for the backward two, and one for the logits again. Providers that
# store the logits have the same count, so that shares of P compare times.
OPERATIONS = {"forward": 2, "backward": 6, "step": 8}
_SEARCH_REPEATS = 10
_FLOAT64_LOGITS = 1 << 28  # logits of the exact reference at a time: 2 GiB, of which it holds about a dozen


@dataclass
class Bench:
    """The device, deadline and options of all measurements, and their rows."""

    device: Device
    deadline: Deadline
    output: Path | None
    dtype: torch.dtype = torch.bfloat16
    repeats: int = 20
    providers: Sequence[Provider] = ON_GPU
    alone: bool = False  # in a process that only measures: another one stamps, shows and writes its rows
    rows: list[Row] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    failed: bool = False

    def __post_init__(self) -> None:
        size = 8192 if self.device.is_cuda else 64
        self.stamp = {**self.device.stamp(), "failed_properties": ""}
        self._operands = tuple(torch.randn(size, size, device=self.device.kind, dtype=self.dtype) for _ in "ab")
        self._result = torch.empty_like(self._operands[0])
        self.product_operations = 2 * size**3

    def product(self) -> None:
        """Run the product whose rate is P."""
        torch.mm(*self._operands, out=self._result)

    def add(self, rows: Iterable[Row]) -> None:
        """Print and keep rows, and write all rows so far, so that a run that is stopped loses nothing."""
        if self.alone:
            self.rows += rows
            return
        for row in rows:
            self.rows.append({**self.stamp, **row})
            if self.device.is_hopper:
                goals.judge(self.rows)
            print(_line(self.rows[-1]), flush=True)
        self.write()

    def tell(self, *sentences: str) -> None:
        """Print findings, and write all findings so far, before anything else may end the process."""
        print(*sentences, sep="\n", flush=True)
        self.findings += sentences
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.output.with_suffix(".txt"), ("\n".join(self.findings) + "\n").encode())

    def write(self) -> None:
        """Write every row so far."""
        if self.output is not None and self.rows:
            write_rows(self.rows, self.output)


def _line(row: Row) -> str:
    head = f"{row['N']}x{row['C']}x{row['D']:<6} {row['provider']:24}"
    if not row.get("median_ms"):
        return f"{head} left out: {row['note']}"
    parts = [
        f"{head} {row['phase']:9} {row['median_ms']:>9} ms  {row['tflops']:>6} TFLOP/s  {row['share_of_P']:>6} of P"
    ]
    parts += [f"{row[key]} {unit}" for key, unit in _OPTIONAL.items() if row.get(key) not in (None, "")]
    if row.get("goal"):
        parts.append(row["goal"])
    if row["failed_properties"]:
        parts.append(f"although it fails: {row['failed_properties']}")
    return "  ".join(parts)


_OPTIONAL = {"extra_mib": "MiB extra", "host_us": "us host", "launches": "launches"}


def _head(shape: Shape, dtype: torch.dtype, provider: str) -> Row:
    kind = str(dtype).removeprefix("torch.")
    return {"N": shape.n, "C": shape.c, "D": shape.d, "dtype": kind, "provider": provider}


def time_shape(bench: Bench, shape: Shape, providers: Sequence[Provider], share: float, *, host: bool = False) -> None:
    """Check and time every provider at one shape, within the fraction ``share`` of the time left."""
    deadline = bench.deadline.share(share)
    inputs = cache(lambda: Inputs.draw(shape, device=bench.device.kind, dtype=bench.dtype))
    exact = cache(lambda truth: exact_step(truth, inputs(), max(1, _FLOAT64_LOGITS // shape.c)))

    def check(provider: Provider) -> None:
        deadline.allow(0.0)
        loss = provider.build(inputs())
        checked[provider] = loss, check_step(provider.name, loss, inputs(), exact(provider.truth))

    def measure(provider: Provider) -> None:
        loss, error = checked[provider]
        rows = _measure(bench, deadline, shape, loss, inputs(), host=host)
        head = _head(shape, bench.dtype, provider.name)
        bench.add({**head, **row, "relative_error": f"{error:.1e}", "note": provider.note} for row in rows)

    checked: dict[Provider, tuple[Callable[[], torch.Tensor], float]] = {}
    for provider in providers:  # check all first, then free the exact gradients
        _attempt(bench, _head(shape, bench.dtype, provider.name), partial(check, provider))
    exact.cache_clear()
    for provider in checked:
        _attempt(bench, _head(shape, bench.dtype, provider.name), partial(measure, provider))


def _reason(failure: Exception) -> str:
    if isinstance(failure, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(failure, TooSlow):
        return str(failure)
    kind = "not importable" if isinstance(failure, ImportError) else type(failure).__name__
    return f"{kind}: {in_one_line(failure, 200)}"


def _attempt(bench: Bench, head: Row, action: Callable[[], None]) -> None:
    """Run the action; if it fails, add a row that says why. The run has failed if ours fails for anything but time.

    The row is added outside the except block, which would keep the failed step's tensors alive.
    """
    reason = ""
    try:
        action()
    except Exception as failure:
        reason = _reason(failure)
    try:
        bench.device.release()
    except Exception as failure:  # CUDA reports an illegal access at a later call, such as this one
        reason = reason or _reason(failure)
    if reason:
        bench.add([{**head, "note": reason}])
        bench.failed |= head["provider"] == "ltloss" and not reason.startswith("too slow")


def _measure(
    bench: Bench, deadline: Deadline, shape: Shape, loss: Callable[[], torch.Tensor], inputs: Inputs, *, host: bool
) -> list[Row]:
    """Rows of forward, backward and both: medians after a warm-up, and the memory beyond inputs and gradients."""
    device, state = bench.device, {}

    def forward() -> None:
        state["loss"] = loss()

    def backward() -> None:
        state.pop("loss").backward()

    inputs.drop_gradients()
    timed = partial(device.time, inputs.drop_gradients, bench.product, [forward, backward])
    first = timed(1)
    a_round = 1e-3 * (sum(times[0] for times in first.steps) + first.product[0])
    deadline.allow(1.2 * (bench.repeats + 3) * a_round)
    timed(2)
    times = timed(bench.repeats)
    inputs.drop_gradients()
    peaks = device.peak_bytes([forward, backward])
    if peaks[1] is not None:
        peaks[1] = max(0, peaks[1] - inputs.gradient_bytes)
    inputs.drop_gradients()
    both = [sum(pair) for pair in zip(*times.steps, strict=True)]
    rows = [
        _speed(bench, shape, phase, OPERATIONS[phase], milliseconds, times.product, peak)
        for phase, milliseconds, peak in zip(OPERATIONS, [*times.steps, both], [*peaks, None], strict=True)
    ]
    if host:
        rows[0] |= {"host_us": f"{device.host_microseconds(loss):.0f}", "launches": device.launches(forward)}
        rows[1]["launches"] = device.launches(backward)
        rows[2]["host_us"] = f"{device.host_microseconds(lambda: loss().backward()):.0f}"
        inputs.drop_gradients()
    return rows


def time_search(bench: Bench, case: SearchCase, deadline: Deadline | None = None) -> None:
    """Check and time one case, and measure the memory that it takes beyond what it holds before."""
    deadline = deadline or bench.deadline
    head = {**_head(case.shape, case.dtype, case.provider), "phase": case.phase}

    def measure() -> None:
        deadline.allow(0.0)
        search = case.build(bench.device.kind, case.shape, case.dtype)
        timed = partial(bench.device.time, lambda: None, bench.product, [search])
        first = timed(2)
        deadline.allow(1.2e-3 * _SEARCH_REPEATS * (first.steps[0][-1] + first.product[-1]))
        times = timed(min(bench.repeats, _SEARCH_REPEATS))
        peak = bench.device.peak_bytes([search])[0] if case.allocates else None
        speed = _speed(bench, case.shape, case.phase, case.operations, times.steps[0], times.product, peak)
        bench.add([{**head, **speed, "note": case.note}])

    _attempt(bench, head, measure)


def apart(bench: Bench, worker: Worker, head: Row, deadline: Deadline, work: Callable[..., None], *given: Any) -> None:
    """Add the rows of ``work(bench, *given)`` from another process, or why there are none; ``head`` begins that row."""
    seconds = deadline.left()
    answer = worker.do(deadline, _measured, bench.device.kind, bench.dtype, bench.repeats, seconds, work, *given)
    rows, failed = ([{**head, "note": answer.problem}], not answer.late) if answer.problem else answer.value
    bench.add(rows)
    bench.failed |= failed


def _measured(
    kind: str, dtype: torch.dtype, repeats: int, seconds: float, work: Callable[..., None], *given: Any
) -> tuple[list[Row], bool]:
    """The rows that the work adds to a bench of this process, and whether it failed."""
    bench = Bench(Device(kind), Deadline(seconds), None, dtype, repeats, alone=True)
    work(bench, *given)
    return bench.rows, bench.failed


def _speed(
    bench: Bench,
    shape: Shape,
    phase: str,
    operations: int,
    milliseconds: Sequence[float],
    product: Sequence[float],
    peak: int | None,
) -> Row:
    median = statistics.median(milliseconds)
    rate = bench.product_operations / statistics.median(product) * 1e-9
    reached = operations * shape.n * shape.c * shape.d / median * 1e-9
    return {
        "phase": phase,
        "median_ms": f"{median:.4f}",
        "min_ms": f"{min(milliseconds):.4f}",
        "max_ms": f"{max(milliseconds):.4f}",
        "repeats": len(milliseconds),
        "tflops": f"{reached:.4g}",
        "share_of_P": f"{reached / rate:.3f}",
        "P_tflops": f"{rate:.4g}",
        "extra_mib": "" if peak is None else f"{peak / (1 << 20):.1f}",
    }


def run(bench: Bench, shapes: Sequence[Shape], quick: bool, usual: bool) -> None:
    """Time ours at every shape, then the peers, the most telling shapes first; ``usual`` adds updates and searches.

    Ours in another process: a kernel that hangs, or breaks its device, costs one shape.
    """
    ours = [provider for provider in bench.providers if provider.name == "ltloss"]
    peers = [provider for provider in bench.providers if provider.name != "ltloss"]
    launch_bound = LAUNCH_BOUND if bench.device.is_cuda else TINY[-1]
    worker = Worker(bench.device.kind, apart=bench.device.is_cuda)
    for shape, host in (*((shape, False) for shape in shapes), (launch_bound, True)) if ours else ():
        head = _head(shape, bench.dtype, "ltloss")
        apart(bench, worker, head, bench.deadline.share(0.3), partial(time_shape, host=host), shape, ours, 1.0)
    section = bench.deadline.share(0.4)
    small = not bench.device.is_cuda
    searches = [*update_cases(small), *kept_cases(small), *search_cases(small)] if usual else []
    for case in searches if ours else ():
        if case.provider == "ltloss":
            head = {**_head(case.shape, case.dtype, case.provider), "phase": case.phase}
            apart(bench, worker, head, section, time_search, case)
    worker.close()
    for case in searches if peers and not quick else ():
        if case.provider != "ltloss":
            time_search(bench, case, section)
    for shape in () if quick else shapes:
        time_shape(bench, shape, peers, 0.4)
    time_shape(bench, launch_bound, peers, 1.0, host=True)
    if bench.device.is_hopper:
        bench.tell(*goals.judge(bench.rows))
