"""What the values of options on the command line mean."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def path(text: str) -> Path:
    """A path that a file can have; an empty one would mean the folder that the command runs in."""
    if "\0" in text:
        raise argparse.ArgumentTypeError("a path holds a NUL byte, which no file name can")
    if not text:
        raise argparse.ArgumentTypeError("an empty path; give a name, or . for this folder")
    return Path(text)


def count(text: str) -> int:
    """A count such as 8192, 100k, 1.5M or 2B."""
    from ltloss.tools.plan import parse_count

    try:
        return parse_count(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no count; give a whole number such as 8192, 100k, 1.5M or 2B"
        ) from None


def named_value(text: str) -> tuple[str, Any]:
    """NAME=VALUE as an option of a loss and its value."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name.replace("-", "_"), _value(value)


def named_values(text: str) -> tuple[str, list[Any]]:
    """NAME=VALUE,VALUE as a name and its values."""
    name, _, values = text.partition("=")
    if not name or not values:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE,VALUE")
    return name.replace("-", "_"), [_value(value) for value in values.split(",")]


def names(text: str) -> list[str]:
    """The names in a list separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # not a number, true or false: a word
        return text
