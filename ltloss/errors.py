"""One family of errors: what a user can put right, in words, told apart by type.

Bad arguments are ValueError, TypeError or IndexError, as everywhere.
"""

from __future__ import annotations

import difflib
import errno
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


class LtlossError(Exception):
    """What was given, what was expected and what to do, in one line."""


class UserError(LtlossError):
    """A setting, a file or a folder that cannot be used."""


class DivergedError(UserError):
    """The loss of a training became NaN or infinite: ``what`` happened, and advice."""

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(what, advice)
        self.what = what

    def __str__(self) -> str:
        """What happened and the advice."""
        return "; ".join(filter(None, self.args))


class ImageError(LtlossError):
    """One image cannot be used; the message is the reason, without the file's name."""


class BackendError(LtlossError, RuntimeError):
    """The backend that was asked for cannot serve the tensors."""


class VariableError(LtlossError, ValueError):
    """An environment variable has a value that means nothing."""


class DistributedError(LtlossError, RuntimeError):
    """Ranks disagree, another rank failed, or one is gone. Raised on every rank that is still there.

    Example:
        >>> from ltloss.distributed import DistributedError
        >>> raise DistributedError("rank 1 of 2 failed, so all do: ValueError: ...")
        Traceback (most recent call last):
        ltloss.errors.DistributedError: rank 1 of 2 failed, so all do: ValueError: ...
    """


def check_counts(**counts: int | None) -> None:
    """UserError that names the first option below 1, written as on the command line; None was not given."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, is {value}; correct it")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Words for an unknown name: the valid names that look like it, or all of them where they fit on a line."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    shown = names if len(names) <= 50 else [*names[:5], f"{len(names) - 5} more"]
    return f"did you mean {' or '.join(close)}?" if close else f"valid are {', '.join(shown)}"


def explain_os_error(error: OSError, again: str = "run the command again") -> str:
    """One line for a failed file operation; a full disk: that nothing finished earlier was harmed, and ``again``."""
    where = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left on the disk while writing{where}; what was finished before is untouched. "
            f"Free some space, then {again}"
        )
    return f"cannot use{where or ' a file'}: {error.strerror or error}"
