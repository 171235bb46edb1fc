"""The margin cross-entropy operator: the same three steps for every backend, device and number of ranks.

    features, prototypes ─► partials ─► margin_loss ─► loss, coefficients ─► gradients ─► dX, dW, db

The pass over all prototypes leaves partial sums over splits of the classes (``ltloss._types.Partials``). The margin
acts on vectors (N,), between that pass and the gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltloss.margins import OBJECTIVE, Objective
from ltloss.numerics import compute_dtype
from ltloss.ops._dispatch import define
from ltloss.ops.logsumexp import (
    BACKENDS,
    KEPT,
    NO_BEND,
    LocalWork,
    Shard,
    Update,
    define_keeping,
    gathered_stats,
    keeps,
    propagate,
    remember,
)

__all__ = ["OPERATORS", "MarginCrossEntropy"]


def _forward(backend: Callable[[], Any], keep: bool = False) -> Callable[..., tuple[Tensor, ...]]:
    def partials_and_loss(features: Tensor, prototypes: Tensor, labels: Tensor, *flat: Any) -> tuple[Tensor, ...]:
        implementation, objective = backend(), Objective.of(*flat)
        kept = [implementation.new_exponentials(features, prototypes)] if keep else []
        partials = implementation.partials(
            features,
            prototypes,
            labels,
            objective.log_prior,
            objective.scale,
            *objective.normalize,
            objective.label_smoothing > 0.0,
            objective.ignore_index,
            *NO_BEND,
            *kept,
        )
        loss = implementation.margin_loss(partials, labels, objective, prototypes.shape[0])
        return (*loss, partials.class_scale, *itertools.chain(*kept))

    return partials_and_loss


def _margin_loss(backend: Callable[[], Any]) -> Callable[..., tuple[Tensor, ...]]:
    def loss_of_ranks(
        logsumexp: Tensor, logit_sum: Tensor, target_cosine: Tensor, norm: Tensor, labels: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        *flat, num_classes = rest
        implementation, objective = backend(), Objective.of(*flat)
        whole = implementation.of_ranks(logsumexp)._replace(
            logit_sum=logit_sum if objective.label_smoothing > 0.0 else None,
            target_cosine=target_cosine,
            norm=norm if objective.with_norm else None,  # not by its length, which is 0 of an empty batch too
        )
        return tuple(implementation.margin_loss(whole, labels, objective, num_classes))

    return loss_of_ranks


def _fake_loss(like: Tensor, n: int, with_norm: bool, reduction: str) -> tuple[Tensor, ...]:
    return (
        like.new_empty(n if reduction == "none" else ()),
        like.new_empty(5 if with_norm else 4, n),
        like.new_empty(()),
        like.new_empty(()),
    )


def _fake_forward(features: Tensor, prototypes: Tensor, labels: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    like, objective = features.new_empty(0, dtype=compute_dtype(features, prototypes)), Objective.of(*flat)
    loss = _fake_loss(like, features.shape[0], objective.with_norm, objective.reduction)
    return (*loss, like.new_empty(prototypes.shape[:-1]))


def _fake_margin_loss(
    logsumexp: Tensor, logit_sum: Tensor, target_cosine: Tensor, norm: Tensor, labels: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    objective = Objective.of(*rest[:-1])
    return _fake_loss(logsumexp, logsumexp.shape[1], objective.with_norm, objective.reduction)


_LOSS = "Tensor loss, Tensor coefficients, Tensor inverse_weight_sum, Tensor max_coefficient"
_WHOLE = f"(Tensor features, Tensor prototypes, Tensor labels, {OBJECTIVE}) -> ({_LOSS}, Tensor class_scale"
OPERATORS = {
    "margin_cross_entropy": define(
        f"margin_cross_entropy{_WHOLE})",
        _fake_forward,
        **{name: _forward(backend) for name, backend in BACKENDS.items()},
    ),
    "margin_cross_entropy_keeping": define_keeping(
        f"margin_cross_entropy_keeping{_WHOLE}, {KEPT})", _fake_forward, _forward
    ),
    "margin_loss": define(
        "margin_loss(Tensor logsumexp, Tensor logit_sum, Tensor target_cosine, Tensor norm, Tensor labels, "
        f"{OBJECTIVE}, int num_classes) -> ({_LOSS})",
        _fake_margin_loss,
        **{name: _margin_loss(backend) for name, backend in BACKENDS.items()},
    ),
}


class MarginCrossEntropy(torch.autograd.Function):
    """The loss on one device, or over a shard with local partials, one all-gather and one reduce-scatter."""

    once = True

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        prototypes: Tensor,
        prior: Tensor | None,
        labels: Tensor,
        objective: Objective,
        num_classes: int,
        backend: str,
        keep: bool,
        shard: Shard | None,
        update: Update | None = None,
        anchor: Tensor | None = None,
    ) -> Tensor:
        """The loss: a scalar, or (N,) for ``reduction="none"``."""
        objective = objective._replace(log_prior=prior)
        ignore_index, smooth = objective.ignore_index, objective.label_smoothing > 0.0
        if shard is None:
            keep = keep and keeps(ctx, features, prototypes, backend)
            operator = OPERATORS["margin_cross_entropy_keeping" if keep else "margin_cross_entropy"][backend]
            loss, coefficients, inverse, largest, class_scale, *kept = operator(
                features, prototypes, labels, *objective.flat()
            )
        else:
            local = LocalWork.of(features, labels, objective, shard)
            keep = keep and keeps(ctx, local.features, prototypes, backend)
            gathered, class_scale, kept = gathered_stats(local, prototypes, objective, smooth, backend, shard, keep)
            loss, coefficients, inverse, largest = OPERATORS["margin_loss"][backend](
                *gathered, labels, *objective.flat(), num_classes
            )
            (features, labels, prior), ignore_index = local, None
        given = features, prototypes, labels, prior
        ctx.save_for_backward(*given, coefficients, class_scale, inverse, largest, *kept)
        ctx.options = objective.scale, smooth, *objective.normalize, ignore_index
        remember(ctx, backend, shard, update, num_classes)
        result: Tensor = loss
        return result

    backward = staticmethod(propagate)
