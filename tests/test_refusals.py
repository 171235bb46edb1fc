"""What the tests of errors take for a fact."""

from __future__ import annotations

import warnings

import pytest
from helpers.refusals import missing, refused, warned


@pytest.mark.parametrize(
    ("facts", "absent"),
    [
        (("tau", "0", "-0.5"), []),
        (("0.5",), []),
        (("5",), ["5"]),
        (("ta", "tau_x"), ["ta", "tau_x"]),
        (("tau", "tau"), ["tau", "tau"]),
    ],
)
def test_a_fact_stands_for_itself(facts: tuple[str, ...], absent: list[str]) -> None:
    found = missing("tau must be at least 0; got -0.5", *facts)
    assert sorted(found) == sorted(set(absent))


@pytest.mark.parametrize("error", [TypeError("tau"), UnicodeError("tau"), ValueError("tau\nagain"), ValueError("beta")])
def test_another_type_more_lines_or_another_name_do_not_pass(error: Exception) -> None:
    with pytest.raises((AssertionError, TypeError)), refused("tau"):
        raise error


def _warn(*messages: str) -> None:
    for message in messages:
        warnings.warn(message, stacklevel=1)


def test_a_warning_states_all_facts_at_once() -> None:
    with pytest.raises(AssertionError), warned("old", "new", kind=UserWarning):
        _warn("old", "new")
    with warned("old", "new", kind=UserWarning):
        _warn("other", "old is new")
