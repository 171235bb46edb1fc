"""Measure on a GPU: times by CUDA events, peak memory, host time, launches; and deadlines.

Everything also runs on the CPU (`--device cpu`), with a wall clock and without memory figures, so that the whole
benchmark can be tested without a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.timing import stamp

Step = Callable[[], Any]


class TooSlow(Exception):
    """Raised for a provider whose repeats would take longer than the time left."""


class Deadline:
    """The time at which a run or a section must end."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds until the end; negative afterwards."""
        return self._end - self._clock()

    def share(self, part: float) -> Deadline:
        """A deadline for a section that may take the fraction ``part`` of the time left."""
        return Deadline(max(0.0, part * self.left()), self._clock)

    def allow(self, seconds: float) -> None:
        """Raise TooSlow if something that takes ``seconds`` would end after the deadline."""
        if seconds > self.left():
            raise TooSlow(f"too slow: would take {seconds:.1f} s, {max(0.0, self.left()):.1f} s are left")


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Within the block, an operation that waits for the device raises an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def ends_within(seconds: float, before_ending: Callable[[], None]) -> Iterator[None]:
    """End the process and its workers after ``seconds``, with exit code 3.

    It ends them even if they wait for a compiler or the device. A timer thread does this, not a signal, because Python
    handles signals only between two of its own instructions.
    """

    def end() -> None:
        try:
            before_ending()
        finally:
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(3)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Phases(NamedTuple):
    """Milliseconds of each repeat: a list for each step, and a list for the product that runs before them."""

    steps: list[list[float]]
    product: list[float]


class Device:
    """Times steps on one device and says how much memory they take."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.is_cuda = kind == "cuda"

    def name(self) -> str:
        """The name of the GPU, or of the processor."""
        return torch.cuda.get_device_name() if self.is_cuda else stamp()["device"]

    @property
    def is_hopper(self) -> bool:
        """Whether it is a GPU of the architecture that the goals are for."""
        return self.is_cuda and torch.cuda.get_device_capability()[0] == 9

    def stamp(self) -> dict[str, str]:
        """Date, commit, device and versions, for every row."""
        try:
            import triton

            version = triton.__version__
        except ImportError:
            version = ""
        who = {name: value for name, value in stamp().items() if name in ("date", "commit", "python", "torch")}
        return {**who, "device": self.name(), "triton": version, "cuda": torch.version.cuda or ""}

    def synchronize(self) -> None:
        """Wait until the device has done everything."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Return unused memory to the driver, so that a provider's fragments do not affect the next one."""
        if self.is_cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def time(self, before: Step, product: Step, steps: Sequence[Step], repeats: int) -> Phases:
        """Repeat: ``before`` untimed, then the product, then the steps, one directly after the other.

        The product comes first so that the host is ahead when the steps start: what is timed is the device.
        """
        times: list[list[float]] = []
        for _ in range(repeats):
            before()
            times.append(self._one_round([product, *steps]))
        columns = [list(column) for column in zip(*times, strict=True)]
        return Phases(columns[1:], columns[0])

    def _one_round(self, steps: Sequence[Step]) -> list[float]:
        if not self.is_cuda:
            moments = [time.perf_counter()]
            for step in steps:
                step()
                moments.append(time.perf_counter())
            return [1e3 * (after - before) for before, after in itertools.pairwise(moments)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for step, event in zip(steps, events[1:], strict=True):
            step()
            event.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]

    def peak_bytes(self, steps: Sequence[Step]) -> list[int | None]:
        """How many bytes each step drives the allocated memory above its level before the first step; None on a CPU."""
        if not self.is_cuda:
            for step in steps:
                step()
            return [None] * len(steps)
        self.release()
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        peaks: list[int | None] = []
        for step in steps:
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() - start)
        return peaks

    def host_microseconds(self, step: Step) -> float:
        """Median time until a call returns, without waiting for the device; each round fits the device's queue."""
        rounds, calls = (5, 10) if self.is_cuda else (1, 1)  # interpreted, it says nothing and takes minutes
        seconds = []
        for _ in range(rounds):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                step()
            seconds.append((time.perf_counter() - start) / calls)
        self.synchronize()
        return 1e6 * statistics.median(seconds)

    def launches(self, step: Step) -> int | None:
        """How many kernels, copies and fills a step starts on the device; None if the profiler cannot tell."""
        if not self.is_cuda:
            return None
        activities = [torch.profiler.ProfilerActivity.CUDA]
        try:
            with torch.profiler.profile(activities=activities) as profile:
                step()
                torch.cuda.synchronize()
        except RuntimeError:  # containers may forbid it
            return None
        on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return len(on_device) or None
