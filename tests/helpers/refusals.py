"""Errors and warnings are tested by their type and by the facts that they state, never by their sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def missing(message: str, *facts: str) -> list[str]:
    """Those facts, names and values as they are written, that a message does not state, or not as often as given.

    A fact stands for itself, not inside a longer word or number: "tau" is not in "tau_x", and "5" not in "0.5".
    """
    said = {fact: re.findall(rf"(?<!\w)(?<!\d\.){re.escape(fact)}(?!\w)(?!\.\d)", message) for fact in facts}
    return [fact for fact, found in said.items() if len(found) < facts.count(fact)]


@contextmanager
def refused(*facts: str, error: type[BaseException] = ValueError) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """What is within raises an error of exactly this type, whose message is one line and states the facts."""
    with pytest.raises(error) as caught:
        yield caught
    message = str(caught.value)
    assert type(caught.value) is error, repr(caught.value)
    assert "\n" not in message, message
    assert not missing(message, *facts), message


@contextmanager
def warned(*facts: str, kind: type[Warning] = DeprecationWarning) -> Iterator[pytest.WarningsRecorder]:
    """What is within warns so, and one warning states all the facts."""
    with pytest.warns(kind) as caught:
        yield caught
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, kind)]
    assert any(not missing(message, *facts) for message in messages), messages
