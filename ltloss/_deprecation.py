"""Old names that keep working for one version, with a DeprecationWarning that names the new one."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing import ParamSpec

    P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)

__all__ = ["FormerAttribute", "renamed_fields", "renamed_keys", "renamed_keywords", "warn_deprecated"]
_OURS = (__name__.removesuffix("_deprecation"), "argparse")  # argparse calls the parsers of the command's options


def warn_deprecated(message: str) -> None:
    """Issue a DeprecationWarning at the first caller outside ltloss, where Python shows it by default."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, DeprecationWarning, stacklevel=level)


def renamed_keys(given: Mapping[str, Any], former: Mapping[str, str]) -> dict[str, Any]:
    """Replace former names in ``given``. ``former`` maps each to its new name, or to "not NAME" if it was the opposite.

    Raises TypeError for a former name together with its new name, and for a negated value that is not a bool.
    """
    values = {}
    for key, value in given.items():
        name = former.get(key, key)
        if name != key:
            said = f"{key} is {name}"
            if name.startswith("not "):
                if value is None:  # its default in 0.2
                    continue
                if not isinstance(value, bool):
                    raise TypeError(f"{key} must be a bool; got {type(value).__name__} {value!r}")
                name, value = name.removeprefix("not "), not value
                said = f"{key}={given[key]} is {name}={value}"
            if name in given:
                raise TypeError(f"{key} is the former name of {name}; pass {name} alone")
            warn_deprecated(f"{said} now; the former name goes with version 0.3")
        values[name] = value
    return values


def renamed_keywords(**former: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function accept former keyword names, with a warning: ``rows="classes"`` as in :func:`renamed_keys`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **given: P.kwargs) -> R:
            if any(name in given for name in former):
                given = renamed_keys(given, former)  # type: ignore[assignment]
            return function(*args, **given)

        return wrapper

    return decorate


def renamed_fields(**former: str) -> Callable[[C], C]:
    """Let a class accept former keyword names, and keep attributes of these names, with a warning."""

    def decorate(cls: C) -> C:
        cls.__init__ = renamed_keywords(**former)(cls.__init__)  # type: ignore[misc]
        for name, now in former.items():
            if not now.startswith("not "):
                setattr(cls, name, FormerAttribute(f"{cls.__name__}.{name}", now))
        return cls

    return decorate


class FormerAttribute:
    """A descriptor that is the attribute ``name`` of today, by its former name (said in full), with a warning."""

    def __init__(self, former: str, name: str) -> None:
        self._name, self._message = name, f"{former} is {name} now; the former name goes with version 0.3"

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            return self
        warn_deprecated(self._message)
        return getattr(instance, self._name)

    def __set__(self, instance: object, value: object) -> None:
        warn_deprecated(self._message)
        setattr(instance, self._name, value)
