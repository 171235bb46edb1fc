"""A progress bar where somebody watches."""

from __future__ import annotations

import sys
from typing import Any


def progress_bar(total: int, done: int = 0, *, quiet: bool = False, what: str = "epoch") -> Any:
    """A tqdm bar on stderr; silent with ``quiet``, or where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit=what, disable=quiet or not sys.stderr.isatty())
