"""What still works for one version under an old name, and says so."""

from __future__ import annotations

import sys
import warnings

__all__ = ["tf32_unless", "warn_deprecated"]
_OURS = ("ltloss.", "argparse")  # an option of the command is read within argparse


def warn_deprecated(message: str) -> None:
    """DeprecationWarning at the first caller outside ltloss, where Python shows it: a script, or the command."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, DeprecationWarning, stacklevel=level)


def tf32_unless(former: str, exact: bool, name: str) -> bool:
    """What the option ``name`` is where a caller gave its opposite, ``exact``, under the ``former`` name of 0.1."""
    warn_deprecated(f"{former}={exact} is {name}={not exact} now; the former name ends with version 0.3")
    return not exact
