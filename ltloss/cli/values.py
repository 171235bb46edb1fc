"""Parsers of option values, and helpers that the commands share."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

from ltloss._deprecation import warn_deprecated


def path(text: str) -> Path:
    """Parse a path. An empty one is refused, because it would mean the current folder."""
    if "\0" in text:
        raise argparse.ArgumentTypeError("a path holds a NUL byte, which no file name can")
    if not text:
        raise argparse.ArgumentTypeError("an empty path; give a name, or . for this folder")
    return Path(text)


def count(text: str) -> int:
    """Parse a count such as 8192, 100k, 1.5M or 2B."""
    factor = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}.get(text[-1:].lower(), 1)
    with suppress(ValueError, ArithmeticError):
        number = Decimal(text[:-1] if factor > 1 else text) * factor  # a float would make 1004.9999999999999 of 1.005k
        if math.isfinite(number) and number == int(number):
            return int(number)
    raise argparse.ArgumentTypeError(f"{text!r} is not a count; give a whole number such as 8192, 100k, 1.5M or 2B")


def add_run(parser: argparse._ActionsContainer) -> None:
    """Add RUN, the run folder that a command reads."""
    parser.add_argument("run", type=path, metavar="RUN", help="the folder that `ltloss train --out` wrote")


def add_renamed(parser: argparse._ActionsContainer, name: str, former: str, **about: Any) -> None:
    """Add an option with a former name, which works for one more version with a warning. --help does not show it."""
    parser.add_argument(name, former, action=_Renamed, **about).option_strings = [name]


class _Renamed(argparse.Action):
    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Keep the value."""
        (name,) = self.option_strings
        if option_string != name:
            warn_deprecated(f"{option_string} is {name} now; the former name goes with version 0.3")
        setattr(namespace, self.dest, values)


def named_value(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE, an option of a loss."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name.replace("-", "_"), _value(value)


def named_values(text: str) -> tuple[str, list[Any]]:
    """Parse NAME=VALUE,VALUE into the name and its values."""
    name, _, values = text.partition("=")
    if not name or not values:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE,VALUE")
    return name.replace("-", "_"), [_value(value) for value in values.split(",")]


def names(text: str) -> list[str]:
    """Parse names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # not a number, true or false: a word
        return text


def picked(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the named options as keyword arguments."""
    return {name: getattr(options, name) for name in names}


def settings_given(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a training that the command line gives."""
    from ltloss.training.run.settings import SETTINGS

    given = {name: value for name, value in vars(options).items() if name in SETTINGS}
    return {**given, "loss_options": dict(given["loss_options"])} if "loss_options" in given else given


def setting_help(name: str) -> str:
    """Return the help text of a setting of a run."""
    from ltloss.training.run.settings import SETTINGS

    return str(SETTINGS[name].metadata["help"])


def need(*modules: str) -> None:
    """Import modules that are needed later, so that a missing one raises ImportError before hours of work."""
    for module in modules:
        importlib.import_module(module)
