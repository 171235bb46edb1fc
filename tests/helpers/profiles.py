"""Which profile of hypothesis runs: that of `make test`, or another one that asks for more cases (`conftest.py`)."""

from __future__ import annotations

from hypothesis import settings


def nightly() -> bool:
    """Whether it is another one than that of `make test`."""
    return settings.get_current_profile_name() != "default"


def cases(usual: int) -> int:
    """So many in `make test`, else as many as the profile has."""
    return settings.default.max_examples if nightly() else usual  # type: ignore[union-attr]
