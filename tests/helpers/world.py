"""Real processes that talk over gloo: start a few, run a function on each, and bring back what they return."""

from __future__ import annotations

import datetime
import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

TIMEOUT = 60.0  # of a collective; a test that hangs ends with it


class Lost(Exception):
    """A process ended without a result; its exit code."""


def processes() -> BaseContext:
    """New processes that need not import torch again: each is forked from one that did nothing but import."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    ours = ["ltloss.distributed", "ltloss.training.run.trainer", "ltloss.testing"]
    # A DTensor imports these on first use: more than a second in every rank.
    context.set_forkserver_preload([*ours, "torch.distributed.tensor", "torch._dynamo"])
    return context


def start(
    function: Callable[..., Any], ranks: int, *args: Any, timeout: float = TIMEOUT
) -> list[tuple[Any, Connection]]:
    """Start ``function(rank, *args)`` on so many ranks, in an initialised gloo group."""
    context = processes()
    store = tempfile.mkdtemp(prefix="world-")
    started = []
    for rank in range(ranks):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_main, args=(there, function, rank, ranks, store, timeout, args), daemon=True)
        process.start()
        there.close()
        started.append((process, here))
    return started


def finish(started: list[tuple[Any, Connection]], patience: float = 120.0) -> list[Any]:
    """What each rank returned, or the exception that ended it, or ``Lost``."""
    results: list[Any] = []
    for process, pipe in started:
        with suppress(EOFError):
            if pipe.poll(patience):
                results.append(torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False))
                continue
            process.kill()
        process.join()
        results.append(Lost(process.exitcode))
    for process, _ in started:
        process.join(patience)
    return results


def run(function: Callable[..., Any], ranks: int, *args: Any, patience: float = 120.0) -> list[Any]:
    """Run on so many ranks; an exception on one of them is raised here, with its traceback."""
    results = finish(start(function, ranks, *args), patience)
    failed = [(rank, result) for rank, result in enumerate(results) if isinstance(result, Exception)]
    # The others fail for want of the first, so what they say comes last.
    failed.sort(key=lambda pair: "Connection" in str(pair[1]))
    if failed:
        told = "\n".join(f"rank {rank} of {ranks}: {getattr(error, 'said', repr(error))}" for rank, error in failed)
        raise AssertionError(told)
    return results


def _main(
    pipe: Connection, function: Callable[..., Any], rank: int, ranks: int, store: str, timeout: float, args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    result: Any
    try:
        torch.manual_seed(0)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}/store",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=timeout),
        )
        result = function(rank, *args)
    except BaseException as error:
        error.said = traceback.format_exc()  # type: ignore[attr-defined]
        result = error
    content = io.BytesIO()
    try:
        torch.save(result, content)
    except Exception:
        content = io.BytesIO()
        torch.save(RuntimeError(getattr(result, "said", repr(result))), content)
    pipe.send_bytes(content.getvalue())
    pipe.close()
    with suppress(Exception):
        dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Counts what PyTorch itself is asked to send, by name of the c10d operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and not func._opname.startswith(("wait", "_wrap")):
            self.calls.append(func._opname.strip("_").removesuffix("_"))
        return func(*args, **(kwargs or {}))


@contextmanager
def one_thread() -> Iterator[None]:
    """As the ranks compute: a sum over several threads would round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
