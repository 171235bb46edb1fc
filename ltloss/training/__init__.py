"""The classification system around the losses: data, training, evaluation, prediction, comparison.

It needs the extra ``train``: ``pip install 'ltloss[train]'``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltloss.training.comparison.grid import compare

__all__ = ["compare"]


def __getattr__(name: str) -> Any:
    if name == "compare":  # imported on first use, because the command line starts before torch does
        from ltloss.training.comparison.grid import compare

        return compare
    raise AttributeError(f"module 'ltloss.training' has no attribute {name!r}")
