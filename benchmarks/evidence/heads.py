"""The classifiers that ``benchmarks.evidence.classifiers`` compares: their search spaces, start and training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.evidence.problems import NETWORK_RATE, Data, accuracy, descend, start_at_means
from ltloss import (
    ArcFaceLoss,
    CosFaceLoss,
    CosineSoftmaxLoss,
    CosineSpaceLoss,
    LDAMLoss,
    LinearSoftmaxLoss,
    LogitAdjustedLoss,
    LongTailLoss,
)
from ltloss.class_balance import log_prior_from_counts
from ltloss.losses.defaults import LONG_TAIL_PRIOR

_GAIN, _SURE = 16.0, 32.0  # of a linear layer: factor on its features, scale of its initial logits
_LRS = (0.06, 0.12, 0.24, 0.48, 0.96)  # learning rates of AdamW, times √D
_COSINE: Mapping[str, Sequence[float]] = {"lr": _LRS, "scale": (16.0, 32.0, 64.0)}
_LINEAR: Mapping[str, Sequence[float]] = {"lr": _LRS, "weight_decay": (0.01, 0.1, 1.0)}
_MARGIN: Mapping[str, Sequence[float]] = {**_COSINE, "margin": (0.1, 0.3, 0.5)}


class Method(NamedTuple):
    """A search space, and ``build``, which makes the loss for counts (C,), D and the tuned values of the loss."""

    title: str
    space: Mapping[str, Sequence[float]]
    build: Callable[..., Any]
    linear: bool = False


def _linear(prior: bool, counts: Tensor, width: int) -> LinearSoftmaxLoss:
    return LinearSoftmaxLoss(len(counts), width, log_prior=log_prior_from_counts(counts) if prior else None)


def _without_counts(loss: Callable[..., Any], counts: Tensor, width: int, **options: float) -> Any:
    return loss(len(counts), width, **options)


def _ldam(counts: Tensor, width: int, scale: float, margin: float) -> LDAMLoss:
    return LDAMLoss.from_counts(counts, width, scale=scale, max_margin=margin)


# METHODS are those of the tables; docs/evidence-embeddings.md also judges the default scales of OTHERS.
METHODS = {
    "logit-adjusted": Method("cosine with log prior (`LogitAdjustedLoss`)", _COSINE, LogitAdjustedLoss.from_counts),
    "linear": Method("linear cross-entropy", _LINEAR, partial(_linear, False), linear=True),
    "linear-prior": Method("linear with log prior", _LINEAR, partial(_linear, True), linear=True),
    "long-tail-prior": Method(
        "long-tail margins with log prior (`LongTailLoss`)",
        _MARGIN,
        partial(LongTailLoss.from_counts, **LONG_TAIL_PRIOR),
    ),
    "cosine": Method("cosine", _COSINE, partial(_without_counts, CosineSoftmaxLoss)),
    "ldam": Method("LDAM", _MARGIN, _ldam),
}
OTHERS = {
    "arcface": Method("ArcFace", _MARGIN, partial(_without_counts, ArcFaceLoss)),
    "cosface": Method("CosFace", _MARGIN, partial(_without_counts, CosFaceLoss)),
    "long-tail": Method("long-tail loss", _MARGIN, LongTailLoss.from_counts),
    "cosine-space": Method("cosine-space loss", _MARGIN, partial(_without_counts, CosineSpaceLoss)),
}
ALL = {**METHODS, **OTHERS}


class _Multiplied(nn.Module):
    """Features times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, features: Tensor) -> Tensor:
        return self.factor * features


def class_means(data: Data) -> Tensor:
    """The mean (C, D) of each class's training samples."""
    counts = torch.bincount(data.labels)
    return torch.zeros(len(counts), data.train.shape[1]).index_add_(0, data.labels, data.train) / counts[:, None]


@torch.no_grad()
def _start(head: Any, method: Method, data: Data) -> None:
    """Start the head as nearest-mean classifier: by distance (linear discriminant analysis), or by angle."""
    means = class_means(data)
    if method.linear:
        head.weight.copy_(_SURE / _GAIN * means)
        head.bias.copy_(-0.5 * _SURE * means.square().sum(1))
    else:
        head.weight.copy_(nn.functional.normalize(means))


def trained(
    method: Method, values: Mapping[str, float], data: Data, batch: int, passes: int, seed: int
) -> tuple[nn.Module, Any]:
    """Network and head after training by AdamW, whose learning rates fall along a cosine."""
    torch.manual_seed(seed)
    network = data.network()
    learns = list(network.parameters())
    counts, width = torch.bincount(data.labels), network(data.train[:2]).shape[1]
    options = {name: value for name, value in values.items() if name not in ("lr", "weight_decay")}
    head = method.build(counts, width, **options)
    if not learns:
        network = _Multiplied(_GAIN if method.linear else 1.0)
        _start(head, method, data)
    elif not method.linear:
        start_at_means(head, network, data.train, data.labels)
    steps = passes * (len(data.labels) // batch)
    given = {"lr": values["lr"] / width**0.5, "weight_decay": values.get("weight_decay", 0.01)}
    optimizers = [torch.optim.AdamW(head.parameters(), **given, fused=True)]
    optimizers += [torch.optim.AdamW(learns, lr=NETWORK_RATE, fused=True)] if learns else []
    descend(network, head, data, optimizers, batch=batch, steps=steps, seed=seed)
    return network, head


def judged(network: nn.Module, head: Any, data: Data) -> dict[str, float]:
    """Accuracy on the test part of the data."""
    return accuracy(network, head, data.test, data.test_labels, torch.bincount(data.labels), data.groups)


@torch.no_grad()
def adjusted(network: nn.Module, head: Any, data: Data, tau: float) -> dict[str, float]:
    """Accuracy with τ·log π subtracted from the logits of a linear head."""
    before = head.bias.clone()
    head.bias -= tau * log_prior_from_counts(torch.bincount(data.labels))
    found = judged(network, head, data)
    head.bias.copy_(before)
    return found


def of_means(data: Data) -> dict[str, float]:
    """Accuracy of the nearest class mean by cosine."""
    head = CosineSoftmaxLoss(int(data.labels.max()) + 1, data.train.shape[1])
    with torch.no_grad():
        head.weight.copy_(class_means(data))
    return judged(nn.Identity(), head, data)
