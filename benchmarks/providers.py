"""Who is measured: each provider builds a training step over the same inputs, and says what is right.

A provider is timed only after its loss and gradients have been compared with the dense reference in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import ltloss.functional as ltloss_functional
from ltloss import reference

SCALE = 30.0
SCALAR_MARGIN = 0.5  # radians, for peers that have no per-class margins


@dataclass(frozen=True)
class Shape:
    """N features of width D against C prototypes."""

    n: int
    c: int
    d: int

    def __str__(self) -> str:
        return f"{self.n}x{self.c}x{self.d}"


@dataclass
class Inputs:
    """Features (N, D), prototypes (C, D), labels (N,), per-class margins (C,): the same numbers for every provider."""

    features: Tensor
    prototypes: Tensor
    labels: Tensor
    margins: Tensor

    @classmethod
    def draw(cls, shape: Shape, seed: int = 0) -> Inputs:
        """Unit-variance features, prototypes of length ≈ 1 (plain logits have unit variance), long-tail margins."""
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(shape.n, shape.d, generator=generator)
        prototypes = torch.randn(shape.c, shape.d, generator=generator) / math.sqrt(shape.d)
        labels = torch.randint(shape.c, (shape.n,), generator=generator)
        counts = 1 + 1000 * torch.rand(shape.c, generator=generator) ** 4
        return cls(features.requires_grad_(), prototypes.requires_grad_(), labels, 0.5 * counts**-0.25)

    @property
    def gradient_bytes(self) -> int:
        """What any training step has to leave behind: one gradient for the features and one for the prototypes."""
        return 4 * (self.features.numel() + self.prototypes.numel())


Objective = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Provider:
    """``build(inputs)`` returns the loss as a function of nothing; ``truth`` is the same loss written densely."""

    name: str
    build: Callable[[Inputs], Callable[[], Tensor]]
    truth: Objective
    compiled: bool = False
    note: str = ""


def _margin_truth(inputs: Inputs) -> Tensor:
    return reference.margin_cross_entropy(
        inputs.features, inputs.prototypes, inputs.labels, scale=SCALE, angular_margin=inputs.margins
    )


def _scalar_margin_truth(inputs: Inputs) -> Tensor:
    return reference.margin_cross_entropy(
        inputs.features,
        inputs.prototypes,
        inputs.labels,
        scale=SCALE,
        angular_margin=SCALAR_MARGIN,
        beyond_pi="arcface",
    )


def _plain_truth(inputs: Inputs) -> Tensor:
    return torch_functional.cross_entropy(inputs.features @ inputs.prototypes.t(), inputs.labels)


def _ours(inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: ltloss_functional.margin_cross_entropy(
        inputs.features, inputs.prototypes, inputs.labels, scale=SCALE, angular_margin=inputs.margins
    )


def _compiled(inputs: Inputs) -> Callable[[], Tensor]:
    compiled = torch.compile(lambda: _margin_truth(inputs))
    return lambda: compiled()


def _linear_cross_entropy(inputs: Inputs) -> Callable[[], Tensor]:
    function: Any = torch_functional.linear_cross_entropy  # torch >= 2.12
    return lambda: function(inputs.features, inputs.prototypes, inputs.labels)


def _linear_cross_entropy_chunked(inputs: Inputs) -> Callable[[], Tensor]:
    function: Any = torch_functional.linear_cross_entropy
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    return lambda: function(inputs.features, inputs.prototypes, inputs.labels, options=options)


def _metric_learning_arcface(inputs: Inputs) -> Callable[[], Tensor]:
    from pytorch_metric_learning.losses import ArcFaceLoss

    loss = ArcFaceLoss(*inputs.prototypes.shape, margin=math.degrees(SCALAR_MARGIN), scale=SCALE)
    del loss.W  # its own weight is (D, C); ours, transposed without a copy, is the same numbers
    loss.W = inputs.prototypes.t()
    return lambda: loss(inputs.features, inputs.labels)


def training_step_providers() -> list[Provider]:
    """Everything that can be imported here, ours first."""
    providers = [
        Provider("ltloss", _ours, _margin_truth),
        Provider("dense", lambda inputs: lambda: _margin_truth(inputs), _margin_truth, note="the reference, eager"),
        Provider("torch.compile", _compiled, _margin_truth, compiled=True, note="the reference, compiled"),
    ]
    if hasattr(torch_functional, "linear_cross_entropy"):
        note = "no margin, no normalisation"
        providers.append(Provider("linear_cross_entropy", _linear_cross_entropy, _plain_truth, note=note))
        chunked = "linear_cross_entropy(options)"
        providers.append(Provider(chunked, _linear_cross_entropy_chunked, _plain_truth, note=note + ", chunked"))
    try:
        import pytorch_metric_learning  # noqa: F401
    except ImportError:
        print("pytorch-metric-learning is not installed: left out (pip install 'ltloss[bench]')")
    else:
        note = "scalar margin"
        providers.append(Provider("pytorch-metric-learning", _metric_learning_arcface, _scalar_margin_truth, note=note))
    return providers


def run_step(loss: Callable[[], Tensor], inputs: Inputs) -> Tensor:
    """One training step without the optimizer: clear the gradients, forward, backward."""
    inputs.features.grad = inputs.prototypes.grad = None
    value = loss()
    value.backward()
    return value.detach()


def check_step(provider: Provider, loss: Callable[[], Tensor], inputs: Inputs, tolerance: float = 2e-4) -> float:
    """Largest relative error (by norm) of loss and gradients against float64; raises if that is no rounding error.

    float32 logits of size s carry an error of about s·6e-8, which the exponential turns into a relative one: 2e-4
    leaves room for a long accumulation, and none for a formula that is wrong.
    """
    value = run_step(loss, inputs)
    exact = Inputs(
        inputs.features.detach().double().requires_grad_(),
        inputs.prototypes.detach().double().requires_grad_(),
        inputs.labels,
        inputs.margins.double(),
    )
    truth = run_step(lambda: provider.truth(exact), exact)
    pairs = [
        (value, truth),
        (inputs.features.grad, exact.features.grad),
        (inputs.prototypes.grad, exact.prototypes.grad),
    ]
    errors = []
    for got, expected in pairs:
        if got is None or expected is None:
            raise RuntimeError(f"{provider.name}: a gradient is missing; not timed")
        errors.append(float((got.double() - expected).norm() / expected.norm()))
    if not max(errors) < tolerance:
        raise RuntimeError(f"{provider.name}: relative errors {errors} exceed {tolerance}; not timed")
    return max(errors)
