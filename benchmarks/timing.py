"""Measuring: interleaved medians for time, fresh processes for memory, one CSV row per measurement."""

from __future__ import annotations

import csv
import ctypes
import datetime
import gc
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ltloss._files import write_csv

RESULTS = Path(__file__).parent / "results"


def interleaved(steps: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each step, run in turn A B C A B C, so that a change in the machine's speed affects all steps."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(warm_up + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            elapsed = time.perf_counter() - start
            if round_number >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of ours/theirs; less than 1 is faster."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def judged(what: str, value: float, bound: float, *, at_least: bool = False) -> str:
    """Whether a goal is met, in words with the numbers; a value is to be at most the bound, unless ``at_least``."""
    met = value >= bound if at_least else value <= bound
    return f"{what} {'met' if met else 'missed'} ({value:.3g}, goal {'>' if at_least else '<'}= {bound:g})"


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def peak_extra_bytes(step: Callable[[], Any], before: Callable[[], None]) -> int:
    """How many bytes the resident memory of this process rises during one step (Linux).

    ``before`` frees what earlier steps left, such as gradients. Freed memory is then returned to the system and the
    high-water mark of the process is reset, so that nothing older is counted, or hides what the step takes.
    """
    before()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    resident = _status_kib("VmRSS")
    step()
    return (_status_kib("VmHWM") - resident) * 1024


def peak_resident_bytes() -> int:
    """The peak resident memory of this process since it began, libraries included (Linux)."""
    return _status_kib("VmHWM") * 1024


def fresh_processes(most: int, environment: Mapping[str, str] | None = None) -> ProcessPoolExecutor:
    """A pool of processes that inherit no threads, memory or device state; ``environment`` adds variables."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(most, spawn, initializer=_set_variables, initargs=(environment or {},))


def _set_variables(environment: Mapping[str, str]) -> None:
    os.environ.update(environment)


def cpu_name() -> str:
    """Model name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit, with "-dirty" if tracked files other than the results differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent, check=False)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", f":(exclude){RESULTS.name}")
    except OSError:
        return "unknown"
    return (commit + ("-dirty" if changed else "")) or "unknown"


def stamp() -> dict[str, str]:
    """Date, commit, machine and versions, for every row."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "device": cpu_name(),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write all rows, with columns in order of first appearance; the file is replaced at once."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, columns, rows)


def add_row(row: Mapping[str, Any], rows: list[dict[str, str]], path: Path) -> None:
    """Add a row to those of a file, write all of them and print it, so that what was measured is kept."""
    rows.append({name: str(value) for name, value in row.items()})
    write_rows(rows, path)
    print(*rows[-1].values(), flush=True)
