"""Run jobs in parallel, in processes of one thread each; jobs that have a result are not run again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from types import TracebackType

import torch

from ltloss.errors import UserError
from ltloss.training.comparison.jobs import Job, run_job
from ltloss.training.run.progress import progress_bar

_LOOK_EVERY = 0.5  # seconds between checks whether the comparison still runs


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers(AbstractContextManager["Workers"]):
    """Runs jobs into the folder ``out``, ``count`` at a time: in this process if that is 1, else in worker processes.

    An error in the block ends the workers at once. The jobs that they were running have no result then.
    """

    def __init__(self, out: Path, count: int, *, quiet: bool) -> None:
        self._out, self._count, self._quiet = out, count, quiet
        context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
        self._stop = context.Event()
        self._pool = ProcessPoolExecutor(count, context, _start_worker, (os.getpid(), self._stop))

    def run(self, jobs: Iterable[Job], what: str) -> None:
        """Run those of the jobs that have no result yet; each writes one file when it is done."""
        for folder in ("runs", "models"):
            (self._out / folder).mkdir(exist_ok=True)
        unique = {job.key: job for job in jobs}
        todo = [job for job in unique.values() if job.result(self._out) is None]
        with progress_bar(len(unique), len(unique) - len(todo), quiet=self._quiet, what=what) as progress:
            for _ in self._here(todo) if self._count == 1 else self._in_processes(todo):
                progress.update()

    def _here(self, jobs: Sequence[Job]) -> Iterator[None]:
        with _one_thread():
            for job in jobs:
                run_job(job, self._out)
                yield

    def _in_processes(self, jobs: Sequence[Job]) -> Iterator[None]:
        try:
            for done in as_completed([self._pool.submit(run_job, job, self._out) for job in jobs]):
                done.result()
                yield
        except BrokenProcessPool:
            raise UserError(
                "a process of the comparison died, perhaps for want of memory; finished trainings are kept, run the "
                "same command with fewer --jobs"
            ) from None

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the workers, at once after an error."""
        if exc_type is not None:
            self._stop.set()
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread as a worker does: sums have the same order, so the number of workers changes no result."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _start_worker(parent: int, stop: Event) -> None:
    """Use one thread, and exit at once when the comparison is interrupted or gone; results are whole or absent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

    def watch() -> None:
        while os.getppid() == parent and not stop.is_set():
            time.sleep(_LOOK_EVERY)
        os._exit(130)

    threading.Thread(target=watch, name="watch", daemon=True).start()
