"""The one exception that a user of the command line is meant to read."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right: one line that names what was given, what was expected and what to do."""


class DivergedError(UserError):
    """The loss of a training became NaN or infinite."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Words for an unknown name: the valid names that look like it, or all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"valid are {', '.join(names)}"


def explain_os_error(error: OSError, again: str = "run the command again") -> str:
    """One line for a failed file operation; a full disk says that nothing finished earlier was harmed, and `again`."""
    where = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left on the disk while writing{where}; what was finished before is untouched. "
            f"Free some space, then {again}"
        )
    return f"cannot use{where or ' a file'}: {error.strerror or error}"
