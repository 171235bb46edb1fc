"""Run work in separate processes, so that a broken device, a dead process or one that hangs costs one piece of work."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from benchmarks.loss_gpu.measure import Deadline, Device
from benchmarks.timing import fresh_processes
from ltloss.errors import in_one_line

__all__ = ["Answer", "Worker", "spread"]

# Seconds after which a piece of work hangs: the slowest compiles some twenty kernels, of one to three seconds each.
PATIENCE = 75.0
GRACE = 15.0  # seconds that work which has begun may take beyond its deadline


class Answer(NamedTuple):
    """The value that work returned, or the ``problem`` that prevented it; ``late``: nothing but too little time."""

    value: Any
    problem: str = ""
    late: bool = False


def _ready() -> int:
    """The id of this process, which has imported this module."""
    return os.getpid()


def _attempt(kind: str, function: Callable[..., Any], arguments: Sequence[Any]) -> Answer:
    try:
        value = function(*arguments)
        Device(kind).release()  # CUDA reports an illegal access at a later call, such as this one
    except Exception as error:
        return Answer(None, f"{type(error).__name__}: {in_one_line(error, 300)}")
    return Answer(value)


class Worker:
    """Runs one function after the other in a separate process, which is replaced after a function raised, died or hung.

    ``apart`` False: in this process, where nothing can be ended. ``environment``: more variables for the other process.
    """

    def __init__(self, kind: str, *, apart: bool, environment: Mapping[str, str] | None = None) -> None:
        self._kind, self._apart, self._environment = kind, apart, environment
        self._pool: ProcessPoolExecutor | None = None
        self._process = 0  # the id of the pool's only process

    def do(self, deadline: Deadline, function: Callable[..., Any], *arguments: Any) -> Answer:
        """Run ``function(*arguments)``, and return its answer, not much later than the deadline."""
        if not self._apart:
            return _attempt(self._kind, function, arguments)
        seconds = 0.0
        try:
            pool = self._started()
            seconds = min(PATIENCE, max(0.0, deadline.left()) + GRACE)
            answer = pool.submit(_attempt, self._kind, function, arguments).result(seconds)
        except BrokenProcessPool:
            answer = Answer(None, "the process died (a crash, or out of memory)")
        except TimeoutError:
            late = seconds < PATIENCE
            answer = Answer(None, f"{'cut off' if late else 'hangs: no answer'} after {seconds:.0f} s", late)
        if answer.problem:
            self.close()
        return answer

    def _started(self) -> ProcessPoolExecutor:
        """The pool, its process ready: what it imports is no work."""
        if self._pool is None:
            self._pool = fresh_processes(1, self._environment)
            self._process = self._pool.submit(_ready).result()
        return self._pool

    def close(self) -> None:
        """End the process, even if it waits for the device; else Python would wait for it when it ends itself."""
        if self._pool is not None:
            with contextlib.suppress(ProcessLookupError):
                if self._process:
                    os.kill(self._process, signal.SIGKILL)
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool, self._process = None, 0


def spread(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    kind: str,
    deadline: Deadline,
    processes: int,
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[Any, Answer]]:
    """Yield each item with the answer of ``function`` as soon as it is known. After the deadline none is begun.

    ``processes`` 0: one item after the other, in this process.
    """
    ahead, lock = iter(items), threading.Lock()
    answers: queue.SimpleQueue[tuple[Any, Answer] | None] = queue.SimpleQueue()

    def lane() -> None:
        worker = Worker(kind, apart=processes > 0, environment=environment)
        try:
            while deadline.left() > 0:
                with lock:
                    item = list(itertools.islice(ahead, 1))
                if not item:
                    break
                answers.put((item[0], worker.do(deadline, function, item[0])))
        finally:
            worker.close()
            answers.put(None)

    lanes = max(1, processes)
    if processes:
        for _ in range(lanes):
            threading.Thread(target=lane, daemon=True).start()
    else:
        lane()
    while lanes:
        answer = answers.get()
        if answer is None:
            lanes -= 1
        else:
            yield answer
