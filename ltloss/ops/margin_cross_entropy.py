"""The margin softmax cross-entropy: one algebra for every backend, every device and every number of ranks.

    features, prototypes ─► partials ─► margin_loss ─► loss, coefficients ─► gradients ─► dX, dW

The wide pass leaves partial sums over splits of the classes (``ltloss._types.Partials``). What a margin does happens on
N-vectors between the two wide passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltloss import reference
from ltloss._types import Reduction
from ltloss.margins import Margin
from ltloss.numerics import compute_dtype
from ltloss.ops._dispatch import choose_backend, define
from ltloss.ops.labels import checked_labels
from ltloss.ops.logsumexp import BACKENDS, LocalWork, Logits, Shard, gathered_stats, propagated

__all__ = ["margin_cross_entropy"]


def _forward(backend: Callable[[], Any]) -> Callable[..., tuple[Tensor, ...]]:
    def run(
        features: Tensor,
        prototypes: Tensor,
        labels: Tensor,
        log_prior: Tensor | None,
        class_weight: Tensor | None,
        margins: list[Tensor | None],
        numbers: list[float],
        beyond_pi: Any,
        margin_gradient: Any,
        scale: float,
        normalize_features: bool,
        label_smoothing: float,
        ignore_index: int,
        reduction: Reduction,
    ) -> tuple[Tensor, ...]:
        implementation = backend()
        smooth = label_smoothing > 0.0
        partials = implementation.partials(
            features, prototypes, labels, log_prior, scale, normalize_features, smooth, ignore_index
        )
        result = implementation.margin_loss(
            partials,
            labels,
            log_prior,
            class_weight,
            _margin(margins, numbers, beyond_pi, margin_gradient),
            scale=scale,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            num_classes=prototypes.shape[0],
            reduction=reduction,
        )
        return (*result, partials.class_factor)

    return run


def _margin(margins: list[Tensor | None], numbers: list[float], beyond_pi: Any, gradient: Any) -> Margin:
    angle, cosine = (n if v is None else v for v, n in zip(margins, numbers, strict=False))
    return Margin(angle, cosine, numbers[2], beyond_pi, gradient)


def _flat(margin: Margin) -> tuple[list[Tensor | None], list[float], str, str]:
    """The margin as a schema can say it."""
    vectors = [value if isinstance(value, Tensor) else None for value in margin[:2]]
    numbers = [0.0 if isinstance(value, Tensor) else float(value) for value in margin[:3]]
    return vectors, numbers, margin.beyond_pi, margin.gradient


def _fake_loss(like: Tensor, n: int, normalize_features: bool, reduction: str) -> tuple[Tensor, ...]:
    return (
        like.new_empty(n if reduction == "none" else ()),
        like.new_empty(4 if normalize_features else 5, n),
        like.new_empty(()),
        like.new_empty(()),
    )


def _fake_forward(features: Tensor, prototypes: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    like = features.new_empty(0, dtype=compute_dtype(features, prototypes))
    normalize_features, reduction = rest[-4], rest[-1]
    return (
        *_fake_loss(like, features.shape[0], normalize_features, reduction),
        like.new_empty(prototypes.shape[0]),
    )


_MARGIN = "Tensor?[] margins, float[] numbers, str beyond_pi, str margin_gradient"
_LOSS = "Tensor loss, Tensor coefficients, Tensor inverse_total, Tensor bound"

_LOSS_AND_COEFFICIENTS = define(
    f"margin_cross_entropy(Tensor features, Tensor prototypes, Tensor labels, Tensor? log_prior, Tensor? class_weight, "
    f"{_MARGIN}, float scale, bool normalize_features, float label_smoothing, int ignore_index, str reduction) "
    f"-> ({_LOSS}, Tensor class_factor)",
    _fake_forward,
    **{name: _forward(backend) for name, backend in BACKENDS.items()},
)


def _stated(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() or tensor.dim() > 1 else None


def _margin_loss(backend: Callable[[], Any]) -> Callable[..., tuple[Tensor, ...]]:
    def run(
        logsumexp: Tensor,
        logit_sum: Tensor,
        target_cosine: Tensor,
        norm: Tensor,
        labels: Tensor,
        log_prior: Tensor | None,
        class_weight: Tensor | None,
        margins: list[Tensor | None],
        numbers: list[float],
        beyond_pi: Any,
        margin_gradient: Any,
        scale: float,
        label_smoothing: float,
        ignore_index: int,
        num_classes: int,
        reduction: Reduction,
    ) -> tuple[Tensor, ...]:
        implementation = backend()
        whole = implementation.of_ranks(logsumexp)._replace(
            logit_sum=_stated(logit_sum), target_cosine=target_cosine, norm=_stated(norm)
        )
        result: tuple[Tensor, ...] = implementation.margin_loss(
            whole,
            labels,
            log_prior,
            class_weight,
            _margin(margins, numbers, beyond_pi, margin_gradient),
            scale=scale,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            num_classes=num_classes,
            reduction=reduction,
        )
        return result

    return run


def _fake_margin_loss(logsumexp: Tensor, logit_sum: Tensor, target_cosine: Tensor, norm: Tensor, *rest: Any) -> Any:
    return _fake_loss(logsumexp, logsumexp.shape[1], norm.numel() == 0, rest[-1])


_MARGIN_LOSS = define(
    "margin_loss(Tensor logsumexp, Tensor logit_sum, Tensor target_cosine, Tensor norm, Tensor labels, "
    f"Tensor? log_prior, Tensor? class_weight, {_MARGIN}, float scale, float label_smoothing, int ignore_index, "
    f"int num_classes, str reduction) -> ({_LOSS})",
    _fake_margin_loss,
    **{name: _margin_loss(backend) for name, backend in BACKENDS.items()},
)


OPERATORS = {
    "margin_cross_entropy": _LOSS_AND_COEFFICIENTS,
    "margin_loss": _MARGIN_LOSS,
}


def margin_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    class_weight: Tensor | None,
    margin: Margin,
    logits: Logits,
    label_smoothing: float,
    reduction: Reduction,
    shard: Shard | None = None,
    num_classes: int | None = None,
) -> Tensor:
    """:func:`ltloss.functional.margin_cross_entropy` on checked arguments; ``num_classes`` of all shards together."""
    num_classes = prototypes.shape[0] if num_classes is None else num_classes
    backend = choose_backend(features, prototypes, sharded=shard is not None)
    assert logits.ignore_index is not None
    labels = checked_labels(labels, num_classes, logits.ignore_index, "labels")
    if backend == "reference":
        return reference.margin_cross_entropy(
            features,
            prototypes,
            labels.to(torch.int64),  # -100 compared with uint8 would be 156
            scale=logits.scale,
            angular_margin=margin.angle,
            cosine_margin=margin.cosine,
            angle_multiplier=margin.multiplier,
            log_prior=log_prior,
            class_weight=class_weight,
            label_smoothing=label_smoothing,
            ignore_index=logits.ignore_index,
            normalize_features=logits.normalize_features,
            beyond_pi=margin.beyond_pi,
            margin_gradient=margin.gradient,
            reduction=reduction,
        )
    rest = (margin, logits, label_smoothing, reduction, backend, shard, num_classes)
    loss: Tensor = _MarginCrossEntropy.apply(  # type: ignore[no-untyped-call]
        features, prototypes, labels, log_prior, class_weight, *rest
    )
    return loss


class _MarginCrossEntropy(torch.autograd.Function):
    """The one loss: whole on one device, or local partials, one all-gather and one reduce-scatter over a shard."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        prototypes: Tensor,
        labels: Tensor,
        log_prior: Tensor | None,
        class_weight: Tensor | None,
        margin: Margin,
        logits: Logits,
        label_smoothing: float,
        reduction: Reduction,
        backend: str,
        shard: Shard | None,
        num_classes: int,
    ) -> Tensor:
        loss: Tensor
        if shard is None:
            loss, coefficients, inverse_total, bound, class_factor = _LOSS_AND_COEFFICIENTS[backend](
                features,
                prototypes,
                labels,
                log_prior,
                class_weight,
                *_flat(margin),
                *logits[:2],
                label_smoothing,
                logits.ignore_index,
                reduction,
            )
            prior = log_prior
        else:
            local = LocalWork.of(features, labels, log_prior, logits, shard)
            gathered, class_factor = gathered_stats(local, prototypes, logits, label_smoothing > 0.0, backend, shard)
            loss, coefficients, inverse_total, bound = _MARGIN_LOSS[backend](
                *gathered,
                labels,
                log_prior,
                class_weight,
                *_flat(margin),
                logits.scale,
                label_smoothing,
                logits.ignore_index,
                num_classes,
                reduction,
            )
            features, labels, prior = local.features, local.labels, local.prior
            logits = logits._replace(ignore_index=None)
        ctx.save_for_backward(features, prototypes, labels, prior, coefficients, class_factor, inverse_total, bound)
        ctx.logits, ctx.smooth, ctx.backend, ctx.shard = logits, label_smoothing > 0.0, backend, shard
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        features, prototypes, labels, prior, coefficients, *saved = ctx.saved_tensors
        grad_features, grad_prototypes = propagated(
            grad_outputs[0], features, prototypes, labels, prior, coefficients, saved, ctx
        )
        return grad_features, grad_prototypes, *(None,) * 10
