"""Gradients of the operators: what each saves, and which operator computes its backward.

Importing this module attaches them. They are registered with the dispatcher instead of being wrapped in
``autograd.Function`` classes, so that eager mode, ``torch.compile`` and ``opcheck`` all see the same gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltloss import ops

__all__: list[str] = []


def _setup_cosine_logsumexp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, prototypes, labels, log_prior, scale, normalize_features, with_logit_sum = inputs
    other_logsumexp, _, _, feature_inverse, prototype_inverse = output
    ctx.mark_non_differentiable(feature_inverse, prototype_inverse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, prototypes, labels, log_prior, other_logsumexp, feature_inverse, prototype_inverse)
    ctx.scale, ctx.normalize_features, ctx.with_logit_sum = scale, normalize_features, with_logit_sum


def _backward_cosine_logsumexp(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_other, grad_own, grad_sum = grads[:3]
    needs = list(ctx.needs_input_grad[:2])
    if not any(needs) or (grad_other is None and grad_own is None and grad_sum is None):
        return (None,) * 7
    grad_features, grad_prototypes = ops.cosine_logsumexp_backward(
        grad_other,
        grad_own,
        grad_sum if ctx.with_logit_sum else None,
        *ctx.saved_tensors,
        ctx.scale,
        ctx.normalize_features,
        needs,
    )
    return (grad_features if needs[0] else None, grad_prototypes if needs[1] else None, *(None,) * 5)


def _setup_fused(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, prototypes, labels, log_prior = inputs[:4]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the other outputs would be four launches
    ctx.save_for_backward(features, prototypes, labels, log_prior, *output[1:])
    scale, _, label_smoothing, ignore_index, normalize_features = inputs[10:15]
    ctx.options = (scale, label_smoothing > 0.0, ignore_index, normalize_features)


def _backward_fused(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    if not any(needs) or grad_loss is None:
        return (None,) * 18
    gradients = ops.fused_margin_cross_entropy_backward(grad_loss, *ctx.saved_tensors, *ctx.options, needs)
    return (gradients[0] if needs[0] else None, gradients[1] if needs[1] else None, *(None,) * 16)


def _setup_nearest_prototype(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    prototypes, rows, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(prototypes, rows, output[1])


def _backward_nearest_prototype(ctx: Any, grad_cosine: Tensor, _: Any) -> tuple[Tensor, None, None]:
    prototypes, rows, index = ctx.saved_tensors
    return ops.nearest_prototype_backward(grad_cosine, prototypes, rows, index), None, None


def _no_gradient(name: str) -> Any:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"ltloss::{name} cannot be differentiated (again); "
            "use ltloss.use_backend('reference') for higher derivatives"
        )

    return backward


torch.library.register_autograd(
    "ltloss::cosine_logsumexp", _backward_cosine_logsumexp, setup_context=_setup_cosine_logsumexp
)
torch.library.register_autograd(
    "ltloss::nearest_prototype", _backward_nearest_prototype, setup_context=_setup_nearest_prototype
)
torch.library.register_autograd("ltloss::fused_margin_cross_entropy", _backward_fused, setup_context=_setup_fused)
for _name in (
    "cosine_logsumexp_backward",
    "fused_margin_cross_entropy_backward",
    "nearest_prototype_backward",
    "top_k",
):
    torch.library.register_autograd(f"ltloss::{_name}", _no_gradient(_name))
