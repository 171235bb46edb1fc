"""The pass over prototypes that are spread over ranks: each works on its own classes, then N-vectors are exchanged.

Forward: every rank has the global batch and computes r and t of its classes. One all-gather of these N-vectors gives
each rank all of them; r = log Σ_k exp(r_k) over the class ranks and t is the owner's. That is exact, and no maximum
has to be agreed on before. Backward: G_ic = a_i·exp(l_ic − r_i) needs the global r only, so each rank computes the
gradient of its prototypes alone, and one reduce-scatter sums dX and sends each row home.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltloss import ops
from ltloss.chunked.logsumexp import compute_dtype
from ltloss.distributed import collectives as comm
from ltloss.distributed.layout import Layout, own_part
from ltloss.distributed.sampling import ClassSampler

__all__ = ["cosine_logsumexp", "send_home"]


def cosine_logsumexp(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    scale: float,
    normalize_features: bool,
    with_logit_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the first three outputs of :func:`ltloss.ops.cosine_logsumexp`, for a DTensor of prototypes.

    Args:
        features: (N, D), the global batch of :class:`~ltloss.distributed.batch_gather.BatchGather`; the gradient
            that comes back counts in this rank's own rows only.
        prototypes: (C, D) DTensor, or any prototypes of which a ``class_sample`` is drawn.
        labels: (N,) int64.
        log_prior: (C,) or None.
        scale, normalize_features, with_logit_sum: as there.
    """
    layout = Layout.of(prototypes)
    prior = None if log_prior is None else log_prior[slice(*layout.span())]
    sampler: ClassSampler | None = getattr(prototypes, "class_sample", None)
    if sampler is None:
        own, labels = own_part(prototypes), layout.local_index(labels)
    else:
        index, own, prior = sampler.draw(labels, prototypes, prior, layout)
        labels = layout.local_index(labels)
        place = torch.searchsorted(index, labels)
        labels = torch.where(labels < 0, -1, place)  # every own class is in the sample
    options = (scale, normalize_features, with_logit_sum)
    vectors: Tensor = _ShardedPass.apply(features, own, labels, prior, layout, options)  # type: ignore[no-untyped-call]
    return vectors[0], vectors[1], vectors[2] if with_logit_sum else vectors.new_empty(0)


class _ShardedPass(torch.autograd.Function):
    """(N, D), own prototypes (c, D) -> the N-vectors r, t and, if asked for, the sum of logits, stacked."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        own: Tensor,
        labels: Tensor,
        prior: Tensor | None,
        layout: Layout,
        options: tuple[float, bool, bool],
    ) -> Tensor:
        rows = layout.group_rows(features.shape[0])
        block, block_labels = features[rows], labels[rows]
        *vectors, feature_inverse, own_inverse = _pass_over(block, own, block_labels, prior, options)
        packed = torch.stack(vectors[: 3 if options[2] else 2])
        gathered = comm.all_gather(packed, layout.group).view(layout.data_ranks, layout.class_ranks, *packed.shape)
        whole = gathered.sum(1)  # the own logit has one owner, and the others have 0
        whole[:, 0] = torch.logsumexp(gathered[:, :, 0], 1)
        ctx.save_for_backward(block, own, block_labels, prior, whole[layout.data_rank, 0], feature_inverse, own_inverse)
        ctx.layout, ctx.options, ctx.rows = layout, options, rows
        return whole.transpose(0, 1).reshape(packed.shape[0], features.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        layout, (scale, normalize_features, with_logit_sum), rows = ctx.layout, ctx.options, ctx.rows
        block, own = ctx.saved_tensors[:2]
        grads = grad_outputs[0][:, rows]
        needs = list(ctx.needs_input_grad[:2])
        if own.shape[0]:
            upstream = (grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous() if with_logit_sum else None)
            grad_block, grad_own = ops.cosine_logsumexp_backward(
                *upstream, *ctx.saved_tensors, scale, normalize_features, needs
            )
        else:
            grad_block, grad_own = torch.zeros_like(block), torch.zeros_like(own)
        if needs[1] and layout.data_group is not None:
            comm.all_reduce(grad_own, layout.data_group)
        total = grad_outputs[0].shape[1]
        grad_features = send_home(grad_block, total, layout) if needs[0] else None
        return grad_features, grad_own if needs[1] else None, None, None, None, None


def _pass_over(
    features: Tensor, own: Tensor, labels: Tensor, prior: Tensor | None, options: tuple[float, bool, bool]
) -> tuple[Tensor, ...]:
    """The operator on this rank's classes; a rank without any has r = -inf and t = 0."""
    if own.shape[0]:
        result: tuple[Tensor, ...] = ops.cosine_logsumexp(features, own, labels, prior, *options)
        return result
    zeros = features.new_zeros(features.shape[0], dtype=compute_dtype(features, own))
    return torch.full_like(zeros, -torch.inf), zeros, zeros, zeros, zeros[:0]


def send_home(partial: Tensor, rows: int, layout: Layout) -> Tensor:
    """Sum the gradients (B, D) of a data group's rows over its ranks: (rows, D), zero but for this rank's own rows."""
    parts = partial.view(layout.class_ranks, partial.shape[0] // layout.class_ranks, partial.shape[1])
    result = partial.new_zeros(rows, partial.shape[1])
    result[layout.own_rows(rows)] = comm.reduce_scatter(parts, layout.class_group)
    return result
