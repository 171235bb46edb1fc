"""What every test starts from: one seed, NaN in uninitialised memory, and Triton's interpreter without a GPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import hypothesis
import pytest

if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    # Before torch reads it. Threads of several processes on the same cores wait for each other most of the time.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, so it must stand before anything imports one.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from helpers.interpreter import quick_interpreter

import ltloss
from benchmarks.kernel_report import launches

# `make test` draws the same cases each time; what it finds is found by everybody. Fixtures here hold for all cases.
_LAWS: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
}
hypothesis.settings.register_profile("default", max_examples=200, derandomize=True, **_LAWS)
# A profile takes from the one in force what it does not say.
hypothesis.settings.register_profile("nightly", max_examples=2000, derandomize=False, print_blob=True, **_LAWS)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True, scope="session")
def launches_written_down() -> Iterator[None]:
    """Where ``python -m benchmarks.kernel_report.launches`` asks for it, to be compiled."""
    with launches.written_down():
        yield


@pytest.fixture(autouse=True, scope="session")
def quick() -> Iterator[None]:
    missing = importlib.util.find_spec("triton") is None
    with nullcontext() if missing or torch.cuda.is_available() else quick_interpreter():
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Fill ``torch.empty`` with NaN, so that reading what was never written shows.

    PyTorch does that itself, but only together with the deterministic algorithms, which would hide a race: tests of
    repeatability take :func:`default_algorithms`.
    """
    if torch.cuda.is_available():  # some CUDA operators would refuse to run
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def default_algorithms(uninitialised_memory_is_nan: None) -> None:
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test under the chunked and under the dense implementation."""
    with ltloss.use_backend(request.param):
        yield request.param


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Make every tile 3 rows by 4 classes, so that a small problem crosses many chunk boundaries."""
    from ltloss.chunked import in_batch, logsumexp, search, tiles

    blocks = tiles.Blocks(3, 4)

    def block_sizes(rows: int, classes: int, width: int, device: torch.device) -> tiles.Blocks:
        return tiles.Blocks(max(1, min(rows, blocks.rows)), min(classes, blocks.classes))

    for module in (in_batch, logsumexp, search):
        monkeypatch.setattr(module, "block_sizes", block_sizes)
    return blocks
