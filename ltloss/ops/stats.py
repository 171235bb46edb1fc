"""The wide pass for those who bring their own function of the two numbers per sample."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltloss import reference
from ltloss._transforms import apply_of
from ltloss.chunked.samples import columns, cosines_of_target
from ltloss.margins import Objective
from ltloss.ops._dispatch import choose_backend
from ltloss.ops.logsumexp import (
    BACKENDS,
    KEEPING_STATS,
    NO_BEND,
    STATS,
    Bend,
    LocalWork,
    Shard,
    Update,
    gathered_stats,
    keeps,
    may_keep,
    propagate,
    remember,
)

__all__ = ["NO_BEND", "Stats", "logsumexp_stats", "target_cosines"]


class Stats(NamedTuple):
    """Per sample, differentiable: see :class:`ltloss.extend.LogSumExpStats`."""

    logsumexp: Tensor
    target_logit: Tensor
    logit_sum: Tensor | None


def logsumexp_stats(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    objective: Objective,
    with_logit_sum: bool,
    shard: Shard | None = None,
    update: Update | None = None,
    bend: Bend = NO_BEND,
) -> Stats:
    """:func:`ltloss.extend.logsumexp_stats` on checked arguments. Differentiable, with any upstream gradient."""
    backend = choose_backend(features, prototypes, sharded=shard is not None, updated=update is not None)
    if backend == "reference":
        return Stats(*reference.logsumexp_stats(features, prototypes, labels, objective, with_logit_sum, bend))
    prior, objective = objective.log_prior, objective._replace(log_prior=None)
    keep = may_keep() and bend[0] is None and labels.dim() == 1
    given = features, prototypes, prior, labels, objective, with_logit_sum, backend, keep, shard, *bend
    run: Any = apply_of(_LogSumExpStats) if update is None else functools.partial(update.run, _LogSumExpStats)
    r, target, logit_sum = run(*given)
    return Stats(r, target, logit_sum if with_logit_sum else None)


@torch.no_grad()
def target_cosines(features: Tensor, prototypes: Tensor, labels: Tensor, shard: Shard | None = None) -> Tensor:
    """cos_y (N,) without a gradient, of all ranks of a shard; 0 where the label is -1."""
    if shard is None:
        return cosines_of_target(features, prototypes, labels).amax(1)
    rows = shard.rows(len(labels))
    own = shard.local_labels(labels[rows])
    cosine = cosines_of_target(features[rows], prototypes, own).amax(1)
    return shard.gather(cosine[None])[:, 0].sum(0)  # a target has one owner, and the others have 0


class _LogSumExpStats(torch.autograd.Function):
    """The wide pass for those who bring their own function of the two numbers per sample."""

    once = True

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        prototypes: Tensor,
        prior: Tensor | None,
        labels: Tensor,
        objective: Objective,
        with_logit_sum: bool,
        backend: str,
        keep: bool,
        shard: Shard | None,
        threshold: Tensor | None,
        polynomial: Tensor | None,
        update: Update | None = None,
        anchor: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        objective = objective._replace(log_prior=prior)
        scale, with_norm, ignore_index = objective.scale, objective.with_norm, objective.ignore_index
        normalize = objective.normalize
        if shard is None:
            keep = keep and keeps(ctx, features, prototypes, backend)
            r, cosine, logit_sum, norm, class_scale, *kept = (KEEPING_STATS if keep else STATS)[backend](
                features,
                prototypes,
                labels,
                prior,
                scale,
                *normalize,
                with_logit_sum,
                ignore_index,
                threshold,
                polynomial,
            )
            if ignore_index is not None:  # a kernel makes NaN of what an ignored row holds, and 0·NaN would reach all
                ignored = columns(labels)[0] == ignore_index
                r, logit_sum, norm = (
                    one.masked_fill(ignored, 0.0) if len(one) else one for one in (r, logit_sum, norm)
                )
        else:
            threshold = None if threshold is None else threshold[shard.rows(len(labels))]
            local = LocalWork.of(features, labels, objective, shard)
            keep = keep and keeps(ctx, local.features, prototypes, backend)
            (parts, sums, cosine, norm), class_scale, kept = gathered_stats(
                local, prototypes, objective, with_logit_sum, backend, shard, keep, (threshold, polynomial)
            )
            r, logit_sum = torch.logsumexp(parts, 0), sums.sum(0) if with_logit_sum else sums
            (features, labels, prior), ignore_index = local, None
        ctx.save_for_backward(features, prototypes, labels, prior, r, class_scale, threshold, polynomial, *kept)
        ctx.options = scale, with_logit_sum, *normalize, ignore_index
        ctx.with_norm = with_norm
        remember(ctx, backend, shard, update)
        factor = scale * norm if with_norm else scale
        if isinstance(factor, Tensor) and cosine.dim() == 2:
            factor = factor[:, None]
        return r, cosine * factor, logit_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        features, prototypes, labels, prior, r, class_scale, threshold, polynomial, *kept = ctx.saved_tensors
        with_logit_sum = ctx.options[1]
        d_all = grads[2] if with_logit_sum else torch.zeros_like(r)
        # The target logit s·‖x‖·cos_y is linear in x: no part of its gradient goes by the length alone.
        first, *others = (one + d_all for one in columns(grads[1]))
        rows = [r, grads[0], first, d_all, *[torch.zeros_like(r)] * ctx.with_norm, *others]
        one = r.new_ones(())
        coefficients, max_coefficient = BACKENDS[ctx.backend]().coefficients(torch.stack(rows))
        given = features, prototypes, labels, prior, coefficients, class_scale, one, max_coefficient
        return propagate(ctx, one, (*given, *kept), (threshold, polynomial))
