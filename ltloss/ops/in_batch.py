"""The operators of the in-batch contrastive losses, for two batches whose rows i belong together.

They run in chunked PyTorch on every device. With the kernels, :func:`ltloss.contrastive.info_nce` runs the pass over
prototypes instead, once in each direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltloss.chunked import in_batch as chunked
from ltloss.numerics import compute_dtype
from ltloss.ops._dispatch import define, no_gradient

__all__ = ["OPERATORS", "logsumexp", "sigmoid_loss"]


def _sums(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(0, dtype=compute_dtype(a, b))


def _fake_logsumexp(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return tuple(_sums(a, b).new_empty(a.shape[0]) for _ in range(3))


def _fake_gradients(*given: Any) -> tuple[Tensor, ...]:
    *_, a, b, scale, _, _, needs = given
    return tuple(one.new_empty(one.shape if need else 0) for one, need in zip((a, b, scale), needs, strict=True))


def _fake_sigmoid(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    like = _sums(a, b)
    shapes = [one.shape if need else 0 for one, need in zip((a, b, scale, bias), needs, strict=True)]
    return (like.new_empty(()), *(like.new_empty(shape) for shape in shapes))


OPERATORS = {
    "in_batch_logsumexp": define(
        "in_batch_logsumexp(Tensor a, Tensor b, Tensor scale) -> (Tensor rows, Tensor columns, Tensor target)",
        _fake_logsumexp,
        torch=chunked.logsumexp,
    ),
    "in_batch_logsumexp_gradients": define(
        "in_batch_logsumexp_gradients(Tensor grad_rows, Tensor grad_columns, Tensor grad_target, Tensor a, Tensor b, "
        "Tensor scale, Tensor rows, Tensor columns, bool[] needs) -> (Tensor a, Tensor b, Tensor scale)",
        _fake_gradients,
        torch=chunked.logsumexp_gradients,
    ),
    "in_batch_sigmoid_loss": define(
        "in_batch_sigmoid_loss(Tensor a, Tensor b, Tensor scale, Tensor bias, bool[] needs) -> "
        "(Tensor loss, Tensor grad_a, Tensor grad_b, Tensor grad_scale, Tensor grad_bias)",
        _fake_sigmoid,
        torch=chunked.sigmoid_loss,
    ),
}
no_gradient(OPERATORS["in_batch_logsumexp_gradients"])


class _LogSumExp(torch.autograd.Function):
    """The log-sum-exps of both directions. The backward recomputes the logits."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        rows, columns, target = OPERATORS["in_batch_logsumexp"]["torch"](a, b, scale)
        ctx.save_for_backward(a, b, scale, rows, columns)
        return rows, columns, target

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad)
        found = OPERATORS["in_batch_logsumexp_gradients"]["torch"](*grads, *ctx.saved_tensors, needs)
        return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))


class _SigmoidLoss(torch.autograd.Function):
    """The forward also computes the gradients, in float32 or float64; the backward scales them."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        loss, *grads = OPERATORS["in_batch_sigmoid_loss"]["torch"](a, b, scale, bias, list(ctx.needs_input_grad))
        ctx.save_for_backward(*grads)
        ctx.dtypes = a.dtype, b.dtype, scale.dtype, bias.dtype
        result: Tensor = loss
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        given = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=True)
        return tuple((grad_loss * grad).to(dtype) if need else None for grad, dtype, need in given)


def logsumexp(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r_i = log Σ_{j≠i} exp(s·cos_ij), r'_j = log Σ_{i≠j} exp(s·cos_ij) and s·cos_ii, (N,) each, differentiable."""
    return _LogSumExp.apply(a, b, scale)  # type: ignore[no-any-return, no-untyped-call]


def sigmoid_loss(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """:func:`ltloss.contrastive.siglip_loss` on checked arguments."""
    if torch.is_grad_enabled():
        return _SigmoidLoss.apply(a, b, scale, bias)  # type: ignore[no-any-return, no-untyped-call]
    loss: Tensor = OPERATORS["in_batch_sigmoid_loss"]["torch"](a, b, scale, bias, [False] * 4)[0]
    return loss
