"""The exceptions of this package: problems that a user can fix, each with a type of its own.

Invalid arguments raise ValueError, TypeError or IndexError, as in PyTorch. The ``ltloss`` command prints the message of
an :class:`LtlossError` as one line, without a traceback.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable

__all__ = [
    "BackendError",
    "DistributedError",
    "DivergedError",
    "ImageError",
    "LtlossError",
    "UserError",
    "VariableError",
]


# Control characters, ends of lines and paragraphs, and those that turn the direction of writing.
_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class LtlossError(Exception):
    """Base class. The message is one line: what was expected, what was given and what to do.

    Example:
        >>> from ltloss.errors import LtlossError, UserError
        >>> try:
        ...     raise UserError("run/settings.json is missing; pass the folder that ltloss train wrote")
        ... except LtlossError as error:
        ...     print(error)
        run/settings.json is missing; pass the folder that ltloss train wrote
    """


class UserError(LtlossError):
    """A setting, a file or a folder cannot be used. Raised by :mod:`ltloss.training` and the command."""


class DivergedError(UserError):
    """The training loss became NaN or infinite.

    Args:
        what: what happened, and at which step.
        advice: what to try; may be empty.
    """

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(what, advice)
        self.what = what

    def __str__(self) -> str:
        """``what`` and ``advice``, joined by a semicolon."""
        return "; ".join(filter(None, self.args))


class ImageError(LtlossError):
    """An image cannot be used. The message gives the reason, without the name of the file."""


class BackendError(LtlossError, RuntimeError):
    """The requested backend (:class:`ltloss.use_backend`) cannot handle the tensors."""


class VariableError(LtlossError, ValueError):
    """An environment variable ``LTLOSS_…`` has an invalid value. Raised by ``import ltloss.runtime``."""


class DistributedError(LtlossError, RuntimeError):
    """Ranks disagree, another rank failed, or one is gone. Raised on every remaining rank.

    See also: :func:`ltloss.distributed.parallelize`, whose modules raise it.

    Example:
        >>> from ltloss.distributed import DistributedError
        >>> raise DistributedError("rank 1 of 2 failed, so all do: ValueError: ...")
        Traceback (most recent call last):
        ltloss.errors.DistributedError: rank 1 of 2 failed, so all do: ValueError: ...
    """


def check_counts(**counts: int | None) -> None:
    """Raise UserError for the first option below 1, with its name as on the command line. None: not given."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1; got {value}")


def printable(text: str) -> str:
    """Replace line ends and what steers a terminal, which names of files and classes may hold: one line stays one."""
    return _STEERING.sub("\ufffd", text)


def nearest(name: str, valid: Iterable[str]) -> str:
    """Suggest valid names for an unknown one: those that resemble it, else all of them, or five of more than 50."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    shown = names if len(names) <= 50 else [*names[:5], f"{len(names) - 5} more"]
    return f"did you mean {' or '.join(close)}?" if close else f"valid are {', '.join(shown)}"


def in_one_line(error: object, most: int | None = None) -> str:
    """The message of an error with spaces for its line breaks, cut to ``most`` characters."""
    return " ".join(str(error).split())[:most]


def explain_os_error(error: OSError, again: str = "run the command again") -> str:
    """Describe a failed file operation in one line. ``again``: what to do once a full disk has space again."""
    where = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left on the disk while writing{where}; files finished earlier are intact. "
            f"Free some space, then {again}"
        )
    return f"cannot use{where or ' a file'}: {error.strerror or error}"
