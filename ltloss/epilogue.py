"""The extension interface of version 0.1. Use :mod:`ltloss.extend`; this module goes with version 0.3."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from ltloss import extend
from ltloss import functional as F
from ltloss._deprecation import FormerAttribute, renamed_keys, renamed_keywords, warn_deprecated
from ltloss._types import Reduction
from ltloss.margins import Objective
from ltloss.ops import stats
from ltloss.ops._dispatch import at_hand

if TYPE_CHECKING:
    from typing import ParamSpec

    P = ParamSpec("P")
R = TypeVar("R")

__all__ = [
    "OnePass",
    "fused_margin_cross_entropy",
    "gather_per_class",
    "margin_losses",
    "one_pass",
    "reduce_losses",
    "wide_pass",
]

warn_deprecated(
    "ltloss.epilogue is ltloss.extend now, and its one_pass is logsumexp_stats; this module goes with version 0.3"
)


class OnePass(extend.LogSumExpStats):
    """:class:`ltloss.extend.LogSumExpStats` by the names that its fields had in version 0.1."""

    def __new__(cls, *values: Any, **named: Any) -> OnePass:
        """Build from the fields, by their former names too."""
        return super().__new__(cls, *values, **renamed_keys(named, _FIELDS))


_FIELDS = {"other_logsumexp": "logsumexp", "own_logit": "target_logit", "own_prior": "target_prior"}
for _former, _name in _FIELDS.items():
    setattr(OnePass, _former, FormerAttribute(f"OnePass.{_former}", _name))


def _former_name(name: str, instead: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def alias(*args: P.args, **given: P.kwargs) -> R:
            warn_deprecated(f"ltloss.epilogue.{name} goes with version 0.3; use {instead}")
            return function(*args, **given)

        return alias

    return decorate


margin_losses = _former_name("margin_losses", "ltloss.extend.margin_losses")(
    renamed_keywords(result="stats")(extend.margin_losses)
)
fused_margin_cross_entropy = _former_name("fused_margin_cross_entropy", "ltloss.functional.margin_cross_entropy")(
    F.margin_cross_entropy
)


@_former_name("one_pass", "ltloss.extend.logsumexp_stats")
def one_pass(features: Tensor, prototypes: Tensor, labels: Tensor, **options: Any) -> OnePass:
    """:func:`ltloss.extend.logsumexp_stats`."""
    return OnePass(*extend.logsumexp_stats(features, prototypes, labels, **options))


@_former_name("reduce_losses", "ltloss.extend.reduce_losses")
def reduce_losses(losses: Tensor, labels: Tensor, class_weight: Tensor | None, reduction: Reduction) -> Tensor:
    """:func:`ltloss.extend.reduce_losses` with the arguments of version 0.1."""
    return extend.reduce_losses(losses, labels, class_weight=class_weight, reduction=reduction)


@_former_name("wide_pass", "ltloss.extend.logsumexp_stats")
def wide_pass(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    scale: float,
    normalize_features: bool,
    with_logit_sum: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The log-sum-exp over other classes, the target logit and the sum of all logits, these two without the prior."""
    prototypes, shard = at_hand(prototypes)
    objective = Objective(log_prior=log_prior, scale=scale, normalize_features=normalize_features, ignore_index=None)
    return stats.logsumexp_stats(features, prototypes, labels, objective, with_logit_sum, shard)


@_former_name("gather_per_class", "values[labels]")
def gather_per_class(values: Tensor | float, labels: Tensor) -> Tensor | float:
    """The value of each sample's class (N,), of the first or the last one for labels outside [0, C)."""
    if not isinstance(values, Tensor) or values.dim() == 0:
        return values
    return values[labels.clamp(0, values.shape[0] - 1)]
