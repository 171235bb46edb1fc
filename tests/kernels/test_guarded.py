"""No kernel reads or writes beyond its memory, leaves anything unwritten, or needs an order of its programs."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers.guarded import watched

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter"),
    pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does"),
]

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


@pytest.mark.parametrize("case", CASES)
def test_nothing_goes_beyond_its_memory_and_no_order_matters(case: str) -> None:
    assert watched(case) == (0, "")


def test_a_read_beyond_is_found() -> None:
    ended, _ = watched("reads_beyond")
    assert ended < 0  # a signal


@pytest.mark.parametrize(("case", "words"), [("leaves_one_out", "guard"), ("needs_an_order", "reverse")])
def test_other_mistakes_are_found(case: str, words: str) -> None:
    ended, said = watched(case)
    assert ended == 0, said
    assert words in said
