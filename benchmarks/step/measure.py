"""Measure each case in a fresh process, the cases in turns, and make rows of the results."""

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
from benchmarks.timing import fresh_processes, judged, paired_ratio, peak_resident_bytes

Row = dict[str, Any]
MIB, GIB = 1 << 20, 1 << 30
WARM_UP = 2  # steps: the first makes the state, the second maps the remaining memory
LONGEST = 90.0  # seconds; a slower case has fewer timed steps, as its row shows


@dataclass(frozen=True)
class Work:
    """A case at a shape."""

    case: str
    shape: Shape


@dataclass
class Found:
    """The results of all rounds of one case, or the reason why there are none."""

    medians: list[float] = field(default_factory=list)  # seconds, of each round
    seconds: list[float] = field(default_factory=list)  # of each step of all rounds
    peak: list[int] = field(default_factory=list)  # bytes, of each round
    losses: tuple[float, float] = (0.0, 0.0)  # first and last
    reason: str = ""

    @property
    def peak_bytes(self) -> int:
        """The largest peak of all rounds."""
        return max(self.peak)


def available_bytes() -> int:
    """Bytes that the machine can give without swapping."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def limit_memory(most_bytes: int | None) -> None:
    """Limit the memory of this process, so that a failed allocation can be reported before the system kills it."""
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))


def take_steps(work: Work, steps: int, most_bytes: int | None) -> tuple[list[float], int, tuple[float, float]]:
    """Seconds of each step after the warm-up, peak bytes, first and last loss; for a process of its own."""
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
    """Peak bytes of a process that only imports torch and ltloss."""
    with fresh_processes(1) as pool:
        return pool.submit(peak_resident_bytes).result()


Take = Callable[[Work, int, int | None], tuple[list[float], int, tuple[float, float]]]


def in_turns(works: Sequence[Work], rounds: int, steps: int, take: Take = take_steps) -> list[Found]:
    """Measure the works in turn A B C A B C, each in a fresh process, so that changes of speed affect all alike."""
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


def verdict(time_ratio: float, memory_ratio: float, goal: Goal | None) -> str:
    """Whether the goals for time and memory are met, in words; empty without a goal."""
    if goal is None:
        return ""
    asked = (("time", time_ratio, goal.time), ("memory", memory_ratio, goal.memory))
    return "; ".join(judged(what, value, most) for what, value, most in asked if most is not None)


def row(kind: str, work: Work, one: Found, idle: int) -> Row:
    """A row with time and memory of one case, or the reason why there are none."""
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
    """Add to each row the ratios to torch's optimizer of the same family, round by round, and whether goals are met."""
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
