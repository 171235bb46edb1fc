"""Run work in separate processes, so that a broken device or a dead process costs one piece of work only."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from benchmarks.loss_gpu.measure import Deadline, Device
from benchmarks.timing import fresh_processes
from ltloss.errors import in_one_line

__all__ = ["Answer", "Worker", "spread"]


class Answer(NamedTuple):
    """The value that a piece of work returned, or the ``problem`` that prevented it."""

    value: Any
    problem: str = ""


def _attempt(kind: str, function: Callable[..., Any], arguments: Sequence[Any]) -> Answer:
    try:
        value = function(*arguments)
        Device(kind).release()  # CUDA reports an illegal access at a later call, such as this one
    except Exception as error:
        return Answer(None, f"{type(error).__name__}: {in_one_line(error, 300)}")
    return Answer(value)


class Worker:
    """Runs one function after the other in a separate process, which is replaced after a function raised or died.

    ``apart`` False: in this process. ``environment``: more variables for the separate process.
    """

    def __init__(self, kind: str, *, apart: bool, environment: Mapping[str, str] | None = None) -> None:
        self._kind, self._apart, self._environment = kind, apart, environment
        self._pool: ProcessPoolExecutor | None = None

    def do(self, function: Callable[..., Any], *arguments: Any) -> Answer:
        """Run ``function(*arguments)``, and return its answer."""
        if not self._apart:
            return _attempt(self._kind, function, arguments)
        if self._pool is None:
            self._pool = fresh_processes(1, self._environment)
        try:
            answer = self._pool.submit(_attempt, self._kind, function, arguments).result()
        except BrokenProcessPool:
            answer = Answer(None, "the process died (a crash, or out of memory)")
        if answer.problem:
            self.close()
        return answer

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def spread(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    kind: str,
    deadline: Deadline,
    processes: int,
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[Any, Answer]]:
    """Yield each item with the answer of ``function`` as soon as it is known, until the deadline.

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
                answers.put((item[0], worker.do(function, item[0])))
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
