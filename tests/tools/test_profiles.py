"""The profiles of hypothesis: the same cases for everybody in `make test`, others every night."""

from __future__ import annotations

import pytest
from hypothesis import settings


@pytest.mark.parametrize(("profile", "same_each_time", "cases"), [("default", True, 200), ("nightly", False, 2000)])
def test_cases_of_a_profile(profile: str, same_each_time: bool, cases: int) -> None:
    chosen = settings.get_profile(profile)
    assert (chosen.derandomize, chosen.max_examples) == (same_each_time, cases)
