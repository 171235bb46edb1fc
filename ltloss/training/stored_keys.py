"""Names in files. They stay where a name in Python changes, so that each version reads what another wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMER_SETTINGS = {"drw_from": "drw_start", "many_above": "many_threshold", "few_below": "few_threshold"}
_STORED = {"images": "pictures", **{now: former for former, now in FORMER_SETTINGS.items()}}


def stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names that they have in files."""
    return {_STORED.get(name, name): value for name, value in values.items()}


def named_as_now(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from a file by the names of today."""
    return {FORMER_SETTINGS.get(name, name): value for name, value in values.items()}
