"""No kernel reads or writes beyond its memory, leaves anything unwritten, or needs an order of its programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter"),
    pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does"),
]

TESTS = Path(__file__).parents[1]
CASES = (
    "float32",
    "float16",
    "mixed",
    "everything",
    "length kept",
    "running maximum",
    "several slabs",
    "lengths in tiles",
    "lengths in tiles, float16",
    "projecting product",
    "projecting product, several slabs",
    "kept",
    "kept, running maximum, several slabs",
    "kept by addresses",
    "kept, lengths in tiles",
    "searches",
    "by addresses",
    "searches by addresses",
    "update in the product",
    "update in the product, rounded, slabs",
    "update in the projection",
    "update of whole rows, slabs",
    "float8",
    "float8, several slabs",
    "update of float8, slabs",
    "searches of float8",
)


def watched(case: str) -> subprocess.CompletedProcess[str]:
    """A case in a process of its own, which an access out of bounds ends."""
    root = TESTS.parent
    paths = os.pathsep.join(map(str, (root, root / "kernels", TESTS)))
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "helpers.guarded", case]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("case", CASES)
def test_nothing_goes_beyond_its_memory_and_no_order_matters(case: str) -> None:
    done = watched(case)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert done.stdout.strip() == ""


def test_a_read_beyond_is_found() -> None:
    assert watched("reads_beyond").returncode < 0  # a signal


@pytest.mark.parametrize(("case", "words"), [("leaves_one_out", "guard"), ("needs_an_order", "reverse")])
def test_other_mistakes_are_found(case: str, words: str) -> None:
    done = watched(case)
    assert done.returncode == 0, done.stderr[-2000:]
    assert words in done.stdout
