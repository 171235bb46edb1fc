"""Jobs side by side, in processes of one thread each; what is done already is not done again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from .compare_jobs import Job, run_job
from .progress import progress_bar

_LOOK_EVERY = 0.5  # seconds between looks whether the comparison still runs


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(jobs: Iterable[Job], out: Path, workers: int, *, what: str, quiet: bool) -> None:
    """Compute those of the jobs that have no result yet, `workers` at a time; each leaves one file when it is done."""
    for folder in ("runs", "models"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    unique = {job.key: job for job in jobs}
    todo = [job for job in unique.values() if job.result(out) is None]
    with progress_bar(len(unique), len(unique) - len(todo), quiet=quiet, what=what) as progress:
        for _ in _in_this_process(todo, out) if workers == 1 else _in_processes(todo, out, min(workers, len(todo))):
            progress.update()


def _in_this_process(jobs: Sequence[Job], out: Path) -> Iterator[None]:
    with _one_thread():
        for job in jobs:
            run_job(job, out)
            yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker: the same sums in the same order, so the number of workers changes no result."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _in_processes(jobs: Sequence[Job], out: Path, workers: int) -> Iterator[None]:
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(), stop)) as pool:
        waiting = [pool.submit(run_job, job, out) for job in jobs]
        try:
            for done in as_completed(waiting):
                done.result()
                yield
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(parent: int, stop: Event) -> None:
    """One thread, and an end at once when the comparison is interrupted or gone: its results are whole or absent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

    def watch() -> None:
        while os.getppid() == parent and not stop.is_set():
            time.sleep(_LOOK_EVERY)
        os._exit(130)

    threading.Thread(target=watch, name="watch", daemon=True).start()
