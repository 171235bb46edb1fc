"""What tests of the GPU benchmark share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest

from benchmarks.loss_gpu import correctness


@pytest.fixture
def few_comparisons(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests of what is said about the comparisons; all of them take a third of a minute."""
    usual = correctness.cases
    monkeypatch.setattr(correctness, "cases", lambda quick: islice(usual(quick), 3))
    correctness._all_cases.cache_clear()
    yield
    correctness._all_cases.cache_clear()
