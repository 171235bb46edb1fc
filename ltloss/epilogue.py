"""The extension interface of version 0.1. Use :mod:`ltloss.extend`; this module goes with version 0.3."""

from __future__ import annotations

from torch import Tensor

from ltloss import extend
from ltloss._deprecation import warn_deprecated
from ltloss._types import Reduction
from ltloss.extend import margin_losses

__all__ = ["margin_losses", "one_pass", "reduce_losses"]

warn_deprecated(
    "ltloss.epilogue is ltloss.extend now, and its one_pass is logsumexp_stats; this module goes with version 0.3"
)

one_pass = extend.logsumexp_stats


def reduce_losses(losses: Tensor, labels: Tensor, class_weight: Tensor | None, reduction: Reduction) -> Tensor:
    """:func:`ltloss.extend.reduce_losses` with the arguments of version 0.1."""
    return extend.reduce_losses(losses, labels, class_weight=class_weight, reduction=reduction)
