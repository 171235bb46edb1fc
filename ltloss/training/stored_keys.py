"""Names in files. They stay when a name in Python changes, so that each version reads the files of others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMER_SETTINGS = {"drw_from": "drw_start", "many_above": "many_threshold", "few_below": "few_threshold"}
_STORED = {"images": "pictures", **{now: former for former, now in FORMER_SETTINGS.items()}}


def stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with their names in files as keys."""
    return {_STORED.get(name, name): value for name, value in values.items()}


def named_as_now(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from a file, with today's names as keys."""
    return {FORMER_SETTINGS.get(name, name): value for name, value in values.items()}
