"""Each case in a fresh process, the cases in turns, and what came of it as rows."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers import Shape
from benchmarks.step.cases import CASES, Case, Goal, Training
from benchmarks.timing import fresh_processes, paired_ratio, peak_resident_bytes

Row = dict[str, Any]
MIB, GIB = 1 << 20, 1 << 30
WARM_UP = 2  # the first step makes the state, the second maps what is left
LONGEST = 90.0  # seconds; a slower case is timed at fewer steps, which its row tells


@dataclass(frozen=True)
class Work:
    """A case at a shape."""

    case: str
    shape: Shape


@dataclass
class Found:
    """What the rounds of one case gave, or why it gave nothing."""

    medians: list[float] = field(default_factory=list)  # of each round
    seconds: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    losses: tuple[float, float] = (0.0, 0.0)
    reason: str = ""

    @property
    def peak_bytes(self) -> int:
        """The most of the rounds."""
        return max(self.peak)


def available_bytes() -> int:
    """What the machine could give without swapping."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def limit_memory(most_bytes: int | None) -> None:
    """Of this process: an allocation that fails can be reported; a machine without memory kills."""
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))


def take_steps(work: Work, steps: int, most_bytes: int | None) -> tuple[list[float], int, tuple[float, float]]:
    """In a process of its own: seconds of each step after the warm-up, peak memory, first and last loss."""
    limit_memory(most_bytes)
    training = Training(CASES[work.case], work.shape)
    seconds, losses = [], []
    began = time.perf_counter()
    for number in range(WARM_UP + steps):
        start = time.perf_counter()
        if number > WARM_UP and start - began > LONGEST:
            break
        losses.append(float(training.step()))
        seconds.append(time.perf_counter() - start)
    if not losses[-1] < losses[0]:
        raise ValueError(f"{work.case} does not train: losses {losses}")
    return seconds[WARM_UP:], peak_resident_bytes(), (losses[0], losses[-1])


def idle_bytes() -> int:
    """A process that has imported torch and ltloss, and nothing else."""
    with fresh_processes(1) as pool:
        return pool.submit(peak_resident_bytes).result()


Take = Callable[[Work, int, int | None], tuple[list[float], int, tuple[float, float]]]


def in_turns(works: Sequence[Work], rounds: int, steps: int, take: Take = take_steps) -> list[Found]:
    """A B C A B C, each in a fresh process: a machine that changes speed changes it for all."""
    found = [Found() for _ in works]
    most_bytes = int(0.9 * available_bytes())
    for number in range(rounds):
        for work, one in zip(works, found, strict=True):
            if one.reason:
                continue
            try:
                with fresh_processes(1) as pool:
                    seconds, peak, one.losses = pool.submit(take, work, steps, most_bytes).result()
            except ImportError as error:
                one.reason = f"not installed: {error}"
            except (RuntimeError, MemoryError, BrokenProcessPool) as error:
                if not isinstance(error, (MemoryError, BrokenProcessPool)) and "can't allocate" not in str(error):
                    raise
                one.reason = f"needs more than the {most_bytes / GIB:.0f} GiB at hand"
            else:
                one.medians.append(statistics.median(seconds))
                one.seconds += seconds
                one.peak.append(peak)
            last = f"{one.medians[-1]:.3f} s, peak {one.peak[-1] / MIB:.0f} MiB" if not one.reason else one.reason
            print(f"round {number + 1}: {work.case} {work.shape}: {last}", flush=True)
    return found


def judged(what: str, value: float, most: float) -> str:
    """Whether a goal is met, by the numbers."""
    return f"{what} {'met' if value <= most else 'missed'} ({value:.3g}, goal <= {most:g})"


def verdict(time_ratio: float, memory_ratio: float, goal: Goal | None) -> str:
    """What came of the goals for time and memory; nothing where nothing is asked for."""
    if goal is None:
        return ""
    asked = (("time", time_ratio, goal.time), ("memory", memory_ratio, goal.memory))
    return "; ".join(judged(what, value, most) for what, value, most in asked if most is not None)


def row(kind: str, work: Work, one: Found, idle: int) -> Row:
    """Time and memory of one case, or why there is neither."""
    case, shape = CASES[work.case], work.shape
    base = {"case": kind, "N": shape.n, "C": shape.c, "D": shape.d, "dtype": str(case.dtype).removeprefix("torch.")}
    base |= {"provider": case.provider, "optimizer": case.name}
    if one.reason:
        return {**base, "note": one.reason}
    return {
        **base,
        "median_ms": f"{1e3 * statistics.median(one.medians):.1f}",
        "min_ms": f"{1e3 * min(one.seconds):.1f}",
        "max_ms": f"{1e3 * max(one.seconds):.1f}",
        "repeats": len(one.seconds),
        "ns_per_class": f"{1e9 * statistics.median(one.medians) / shape.c:.1f}",
        "peak_mib": f"{one.peak_bytes / MIB:.0f}",
        "above_idle_mib": f"{(one.peak_bytes - idle) / MIB:.0f}",
        "note": f"loss {one.losses[0]:.2f} -> {one.losses[1]:.2f}",
    }


def compared(works: Sequence[Work], found: Sequence[Found], rows: Sequence[Row]) -> None:
    """Add to each row its ratios to today's of the same family, by the rounds, and whether its goal is met."""
    by_name = {work.case: one for work, one in zip(works, found, strict=True)}
    today = {CASES[name].family: one for name, one in by_name.items() if CASES[name].is_today}
    fused = {family: by_name.get(f"torch {family}, fused") for family in today}
    for work, one, entry in zip(works, found, rows, strict=True):
        case: Case = CASES[work.case]
        base = today.get(case.family)
        if one.reason or base is None or base.reason:
            continue
        ratios = paired_ratio(one.medians, base.medians), one.peak_bytes / base.peak_bytes
        entry |= {"time_ratio": f"{ratios[0]:.3f}", "memory_ratio": f"{ratios[1]:.3f}"}
        entry["goal"] = verdict(*ratios, case.goal)
        if (other := fused[case.family]) is not None and not other.reason:
            entry["time_ratio_to_fused"] = f"{paired_ratio(one.medians, other.medians):.3f}"
