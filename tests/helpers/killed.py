"""Processes that SIGKILL ends between two slabs of one backward, when some prototypes have moved and others not."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import world
from ltloss.optim.slabs import Slabs

needs_sigkill = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="no SIGKILL on this system"
)


def started(function: Callable[..., Any], *arguments: Any, killed_in: int | None = None) -> BaseProcess:
    """A new process that calls the function, and dies in its backward of the number ``killed_in`` (from 1)."""
    process: BaseProcess = world.processes().Process(  # type: ignore[attr-defined]
        target=_call, args=(function, arguments, killed_in)
    )
    process.start()
    return process


def exit_code(function: Callable[..., Any], *arguments: Any, killed_in: int | None = None) -> int | None:
    """That of such a process, once it has ended."""
    process = started(function, *arguments, killed_in=killed_in)
    process.join()
    return process.exitcode


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], killed_in: int | None) -> None:
    torch.set_num_threads(1)
    if killed_in is not None:
        _die_at_second_slab(killed_in)
    raise SystemExit(function(*arguments))


def _die_at_second_slab(backward: int) -> None:
    original, begun = Slabs.take, 0

    def take(self: Slabs, start: int, stop: int, gradient: Tensor) -> None:
        nonlocal begun
        begun += start == 0
        if begun == backward and start > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, start, stop, gradient)

    Slabs.take = take  # type: ignore[method-assign]
