"""What tests of the GPU benchmark share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.loss_gpu import correctness, updates
from benchmarks.peers import Shape


@pytest.fixture
def sizes_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the sizes that fill a GPU: as many samples as choose other kernels there, and the same widths."""
    monkeypatch.setattr(correctness, "SHAPES", (*correctness.SHAPES[:4], (600, 200, 72), *correctness.SHAPES[5:]))
    monkeypatch.setattr(updates, "_SHAPES", tuple(Shape(one.n, one.c // 10, one.d) for one in updates._SHAPES))


@pytest.fixture
def ends() -> Callable[[int], bool]:
    """Whether a process is gone, or will be in seconds: it may have been killed and not yet have noticed."""

    def ends(process: int) -> bool:
        status = Path(f"/proc/{process}/status")
        for _ in range(100):
            try:
                if "zombie" in status.read_text():
                    return True
            except (FileNotFoundError, ProcessLookupError):
                return True
            time.sleep(0.1)
        return False

    return ends


@pytest.fixture
def few_comparisons(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests of what is said about the comparisons; all of them take some seconds."""
    usual = correctness.cases
    monkeypatch.setattr(correctness, "cases", lambda quick: islice(usual(quick), 3))
    correctness._all_cases.cache_clear()
    yield
    correctness._all_cases.cache_clear()
