"""Who is measured: each provider builds a training step over the same inputs, and says what is right.

A provider is timed only after its loss and gradients have been compared with the dense reference in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    def draw(cls, shape: Shape, seed: int = 0, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
        """Unit-variance features, prototypes of length ≈ 1 (plain logits have unit variance), long-tail margins."""
        generator = torch.Generator(device).manual_seed(seed)
        on: dict[str, Any] = {"generator": generator, "device": device}
        features = torch.randn(shape.n, shape.d, dtype=dtype, **on)
        prototypes = torch.randn(shape.c, shape.d, dtype=dtype, **on).div_(math.sqrt(shape.d))
        labels = torch.randint(shape.c, (shape.n,), **on)
        counts = 1 + 1000 * torch.rand(shape.c, **on) ** 4
        return cls(features.requires_grad_(), prototypes.requires_grad_(), labels, 0.5 * counts**-0.25)

    @property
    def gradient_bytes(self) -> int:
        """What any training step has to leave behind: one gradient for the features and one for the prototypes."""
        return self.features.nbytes + self.prototypes.nbytes

    def drop_gradients(self) -> None:
        """Forget what the last step left behind."""
        self.features.grad = self.prototypes.grad = None


Objective = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Provider:
    """``build(inputs)`` returns the loss as a function of nothing; ``truth`` is the same loss written densely."""

    name: str
    build: Callable[[Inputs], Callable[[], Tensor]]
    truth: Objective
    compiled: bool = False
    note: str = ""


def margin_truth(inputs: Inputs) -> Tensor:
    return reference.margin_cross_entropy(
        inputs.features, inputs.prototypes, inputs.labels, scale=SCALE, angular_margin=inputs.margins
    )


def scalar_margin_truth(inputs: Inputs) -> Tensor:
    return reference.margin_cross_entropy(
        inputs.features,
        inputs.prototypes,
        inputs.labels,
        scale=SCALE,
        angular_margin=SCALAR_MARGIN,
        beyond_pi="arcface",
    )


def plain_truth(inputs: Inputs) -> Tensor:
    return torch_functional.cross_entropy(inputs.features @ inputs.prototypes.t(), inputs.labels)


def ours(inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: ltloss_functional.margin_cross_entropy(
        inputs.features, inputs.prototypes, inputs.labels, scale=SCALE, angular_margin=inputs.margins
    )


def _compiled(inputs: Inputs) -> Callable[[], Tensor]:
    compiled = torch.compile(lambda: margin_truth(inputs))
    return lambda: compiled()


def linear_cross_entropy(inputs: Inputs) -> Callable[[], Tensor]:
    function: Any = torch_functional.linear_cross_entropy  # torch >= 2.12
    return lambda: function(inputs.features, inputs.prototypes, inputs.labels)


def _linear_cross_entropy_chunked(inputs: Inputs) -> Callable[[], Tensor]:
    function: Any = torch_functional.linear_cross_entropy
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    return lambda: function(inputs.features, inputs.prototypes, inputs.labels, options=options)


def metric_learning_arcface(inputs: Inputs) -> Callable[[], Tensor]:
    from pytorch_metric_learning.losses import ArcFaceLoss

    classes, width = inputs.prototypes.shape
    loss = ArcFaceLoss(1, width, margin=math.degrees(SCALAR_MARGIN), scale=SCALE)
    loss.num_classes = classes
    del loss.W  # its own weight is (D, C); ours, transposed without a copy, is the same numbers
    loss.W = inputs.prototypes.t()
    return lambda: loss(inputs.features, inputs.labels)


def training_step_providers() -> list[Provider]:
    """Everything that can be imported here, ours first."""
    providers = [
        Provider("ltloss", ours, margin_truth),
        Provider("dense", lambda inputs: lambda: margin_truth(inputs), margin_truth, note="the reference, eager"),
        Provider("torch.compile", _compiled, margin_truth, compiled=True, note="the reference, compiled"),
    ]
    if hasattr(torch_functional, "linear_cross_entropy"):
        note = "no margin, no normalisation"
        providers.append(Provider("linear_cross_entropy", linear_cross_entropy, plain_truth, note=note))
        chunked = "linear_cross_entropy(options)"
        providers.append(Provider(chunked, _linear_cross_entropy_chunked, plain_truth, note=note + ", chunked"))
    try:
        import pytorch_metric_learning  # noqa: F401
    except ImportError:
        print("pytorch-metric-learning is not installed: left out (pip install 'ltloss[bench]')")
    else:
        note = "scalar margin"
        providers.append(Provider("pytorch-metric-learning", metric_learning_arcface, scalar_margin_truth, note=note))
    return providers


def run_step(loss: Callable[[], Tensor], inputs: Inputs) -> Tensor:
    """One training step without the optimizer: clear the gradients, forward, backward."""
    inputs.drop_gradients()
    value = loss()
    value.backward()
    return value.detach()


class Step(NamedTuple):
    """What a training step computes: the mean loss and both gradients."""

    loss: Tensor
    features: Tensor
    prototypes: Tensor


def exact_step(truth: Objective, inputs: Inputs, rows: int | None = None) -> Step:
    """Loss and gradients in float64, ``rows`` samples at a time where not all N×C logits fit at once."""
    n = inputs.features.shape[0]
    prototypes = inputs.prototypes.detach().double().requires_grad_()
    losses, grads = [], []
    for start in range(0, n, rows or n):
        part = slice(start, start + (rows or n))
        features = inputs.features[part].detach().double().requires_grad_()
        loss = truth(Inputs(features, prototypes, inputs.labels[part], inputs.margins.double()))
        loss = loss * (features.shape[0] / n)  # the mean over all, of which this is a part
        loss.backward()
        losses.append(loss.detach())
        grads.append(features.grad)
    if prototypes.grad is None:
        raise RuntimeError("the dense reference leaves no gradient for the prototypes")
    return Step(torch.stack(losses).sum(), torch.cat([grad for grad in grads if grad is not None]), prototypes.grad)


def check_step(name: str, loss: Callable[[], Tensor], inputs: Inputs, exact: Step, tolerance: float = 2e-4) -> float:
    """Largest relative error (by norm) of loss and gradients; raises if that is no rounding error.

    float32 logits of size s carry an error of about s·6e-8, which the exponential turns into a relative one: 2e-4
    leaves room for a long accumulation, and none for a formula that is wrong.
    """
    value = run_step(loss, inputs)
    errors = []
    for got, expected in zip((value, inputs.features.grad, inputs.prototypes.grad), exact, strict=True):
        if got is None:
            raise RuntimeError(f"{name}: a gradient is missing; not timed")
        errors.append(float((got.double() - expected).norm() / expected.norm()))
    if not max(errors) < tolerance:
        raise RuntimeError(f"{name}: relative errors {errors} exceed {tolerance}; not timed")
    return max(errors)
