"""What still works for one version under an old name, and says so."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_deprecated"]


def warn_deprecated(message: str) -> None:
    """DeprecationWarning at the first caller outside ltloss, where Python shows it: a script, or the command."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("ltloss."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, DeprecationWarning, stacklevel=level)
