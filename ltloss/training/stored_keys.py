"""Names in files. They stay where a name in Python changes, so that each version reads what another wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STORED = {"images": "pictures"}


def stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names that they have in files."""
    return {_STORED.get(name, name): value for name, value in values.items()}
