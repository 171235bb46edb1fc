"""The providers that are measured: each builds a loss over the same inputs, and has a dense reference.

A provider is timed only after its loss and gradients were compared with its reference in float64.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import ltloss.functional as ltloss_functional
from ltloss import reference
from ltloss.margins import Margin, margin_cosine

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
    """Features (N, D), prototypes (C, D), labels (N,), margins (C,) in radians; the same for every provider."""

    features: Tensor
    prototypes: Tensor
    labels: Tensor
    margins: Tensor

    @classmethod
    def draw(cls, shape: Shape, seed: int = 0, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
        """Draw features of unit variance, prototypes of length ≈ 1, and long-tail margins.

        Logits without normalisation then have unit variance.
        """
        generator = torch.Generator(device).manual_seed(seed)
        on: dict[str, Any] = {"generator": generator, "device": device}
        features = torch.randn(shape.n, shape.d, dtype=dtype, **on)
        prototypes = torch.randn(shape.c, shape.d, dtype=dtype, **on).div_(math.sqrt(shape.d))
        labels = torch.randint(shape.c, (shape.n,), **on)
        counts = 1 + 1000 * torch.rand(shape.c, **on) ** 4
        return cls(features.requires_grad_(), prototypes.requires_grad_(), labels, 0.5 * counts**-0.25)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that every training step leaves: of the features and of the prototypes."""
        return self.features.nbytes + self.prototypes.nbytes

    def drop_gradients(self) -> None:
        """Free the gradients of the last step."""
        self.features.grad = self.prototypes.grad = None


Objective = Callable[[Inputs], Tensor]
Build = Callable[[Inputs], Callable[[], Tensor]]


@dataclass(frozen=True)
class Provider:
    """``build(inputs)`` returns the loss as a function without arguments; ``truth`` is the same loss, dense.

    ``build`` raises ImportError if the provider is not installed.
    """

    name: str
    build: Build
    truth: Objective
    compiled: bool = False  # by torch.compile, for each shape anew
    note: str = ""


def _margin_loss(function: Callable[..., Tensor], inputs: Inputs, **options: Any) -> Tensor:
    return function(inputs.features, inputs.prototypes, inputs.labels, scale=SCALE, **options)


def margin_truth(inputs: Inputs) -> Tensor:
    return _margin_loss(reference.margin_cross_entropy, inputs, angular_margin=inputs.margins)


def scalar_margin_truth(inputs: Inputs) -> Tensor:
    return _margin_loss(reference.margin_cross_entropy, inputs, angular_margin=SCALAR_MARGIN, beyond_pi="arcface")


def plain_truth(inputs: Inputs) -> Tensor:
    return torch_functional.cross_entropy(inputs.features @ inputs.prototypes.t(), inputs.labels)


def dense_margin_loss(inputs: Inputs) -> Tensor:
    """The loss as training scripts write it: all cosines, the target's replaced, cross-entropy in float32.

    For inputs in half precision, the normalised copies and the cosines are half precision too, as under autocast.
    """
    unit = torch_functional.normalize(inputs.features), torch_functional.normalize(inputs.prototypes)
    cosine = (unit[0] @ unit[1].t()).float()
    labels = inputs.labels[:, None]
    margin = margin_cosine(cosine.gather(1, labels)[:, 0], angular_margin=inputs.margins[inputs.labels])
    return torch_functional.cross_entropy(SCALE * cosine.scatter(1, labels, margin[:, None]), inputs.labels)


_ON_PRODUCTS: dict[str, Any] = {"scale": 1.0, "normalize_features": False, "normalize_prototypes": False}


def _ours_linear(inputs: Inputs) -> Callable[[], Tensor]:
    given = inputs.features, inputs.prototypes, inputs.labels
    return lambda: ltloss_functional.margin_cross_entropy(*given, **_ON_PRODUCTS)


def _ours(inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: _margin_loss(ltloss_functional.margin_cross_entropy, inputs, angular_margin=inputs.margins)


def _eager(objective: Objective) -> Build:
    return lambda inputs: lambda: objective(inputs)


def _compiled(objective: Objective) -> Build:
    def build(inputs: Inputs) -> Callable[[], Tensor]:
        torch.compiler.reset()  # for every shape: after eight recompilations the compiler would run it eagerly
        compiled = torch.compile(lambda: objective(inputs), dynamic=False)
        return lambda: compiled()

    return build


_BLOCK_BYTES = 256 << 20  # of the logits that the row blocks hold at a time


class _RowBlocks(torch.autograd.Function):
    """Loss of unit features and prototypes, some rows at a time: a library product, one pass, two library products.

    The forward computes the gradients, while it has the logits; the backward scales them.
    """

    @staticmethod
    def forward(ctx: Any, unit: Tensor, weight: Tensor, inputs: Inputs, one_pass: Callable[..., Any]) -> Tensor:
        rows = max(1, _BLOCK_BYTES // (weight.shape[0] * weight.element_size()))
        grad_unit, grad_weight = torch.empty_like(unit), torch.zeros_like(weight, dtype=torch.float32)
        loss = unit.new_zeros((), dtype=torch.float32)
        for start in range(0, len(unit), rows):
            block, labels = unit[start : start + rows], inputs.labels[start : start + rows]
            part, d_cosine = one_pass(block @ weight.t(), labels, inputs.margins[labels], len(unit))
            loss += part
            grad_unit[start : start + rows] = d_cosine @ weight
            grad_weight += d_cosine.t() @ block
        ctx.save_for_backward(grad_unit, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        unit, weight = ctx.saved_tensors
        return grads[0] * unit, grads[0] * weight, None, None


def _softmax_pass(cosine: Tensor, labels: Tensor, margins: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The summed loss of a block divided by ``count``, and its gradient for the cosines, in their dtype."""
    labels, margin = labels[:, None], Margin(margins)
    wide = cosine.float()
    target = wide.gather(1, labels)[:, 0]
    logit = SCALE * wide.scatter(1, labels, margin.value(target)[:, None])
    lse = torch.logsumexp(logit, 1)
    own = logit.gather(1, labels)[:, 0]
    probability = torch.exp(logit - lse[:, None]) * (SCALE / count)
    d_target = (torch.exp(own - lse) - 1.0) * margin.slope(target) * (SCALE / count)
    return (lse - own).sum() / count, probability.scatter(1, labels, d_target[:, None]).to(cosine.dtype)


def row_blocks(inputs: Inputs, *, compiled: bool = True) -> Callable[[], Tensor]:
    if compiled:
        torch.compiler.reset()
    one_pass = torch.compile(_softmax_pass, dynamic=False) if compiled else _softmax_pass

    def loss() -> Tensor:
        unit = torch_functional.normalize(inputs.features), torch_functional.normalize(inputs.prototypes)
        value: Tensor = _RowBlocks.apply(*unit, inputs, one_pass)  # type: ignore[no-untyped-call]
        return value

    return loss


def _linear_cross_entropy(inputs: Inputs, *, chunked: bool = False) -> Callable[[], Tensor]:
    if not hasattr(torch_functional, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy (2.12 has)")
    function: Any = torch_functional.linear_cross_entropy
    options = {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}  # type: ignore[attr-defined]
    return lambda: function(inputs.features, inputs.prototypes, inputs.labels, **options)


def _liger(inputs: Inputs) -> Callable[[], Tensor]:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(inputs.prototypes, inputs.features, inputs.labels)


def _cut_cross_entropy(inputs: Inputs) -> Callable[[], Tensor]:
    function: Any = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda: function(inputs.features, inputs.prototypes, inputs.labels)


def _metric_learning_arcface(inputs: Inputs) -> Callable[[], Tensor]:
    losses = importlib.import_module("pytorch_metric_learning.losses")
    classes, width = inputs.prototypes.shape
    loss = losses.ArcFaceLoss(1, width, margin=math.degrees(SCALAR_MARGIN), scale=SCALE)
    loss.num_classes = classes
    del loss.W  # its weight is (D, C): our prototypes, transposed without a copy
    loss.W = inputs.prototypes.t()
    return lambda: loss(inputs.features, inputs.labels)


_PLAIN = "no margin, no normalisation"
_OURS = Provider("ltloss", _ours, margin_truth)
_LINEAR = Provider("linear_cross_entropy", _linear_cross_entropy, plain_truth, note=_PLAIN)
_METRIC_LEARNING = Provider(
    "pytorch-metric-learning", _metric_learning_arcface, scalar_margin_truth, note="scalar margin"
)
_LINEAR_CHUNKED = Provider(
    "linear_cross_entropy(options)",
    partial(_linear_cross_entropy, chunked=True),
    plain_truth,
    note=f"{_PLAIN}, chunked",
)
# Ours first.
ON_CPU = (
    _OURS,
    Provider("dense", _eager(margin_truth), margin_truth, note="the reference, eager"),
    Provider("torch.compile", _compiled(margin_truth), margin_truth, compiled=True, note="the reference, compiled"),
    _LINEAR,
    _LINEAR_CHUNKED,
    _METRIC_LEARNING,
)
# Softmax of a linear layer: no margin, no normalisation.
LINEAR_ON_CPU = (Provider("ltloss", _ours_linear, plain_truth, note="linear"), _LINEAR, _LINEAR_CHUNKED)
ON_GPU = (
    _OURS,
    Provider("dense", _eager(dense_margin_loss), margin_truth, note="eager"),
    Provider("torch.compile", _compiled(dense_margin_loss), margin_truth, compiled=True, note="of the dense formula"),
    Provider("row blocks", row_blocks, margin_truth, compiled=True, note="library products and one compiled pass"),
    _LINEAR,
    Provider("liger", _liger, plain_truth, note=f"{_PLAIN}, gradients computed in the forward"),
    Provider("cut-cross-entropy", _cut_cross_entropy, plain_truth, note=_PLAIN),
    _METRIC_LEARNING,
)


def run_step(loss: Callable[[], Tensor], inputs: Inputs) -> Tensor:
    """One training step without the optimizer: clear the gradients, forward, backward."""
    inputs.drop_gradients()
    value = loss()
    value.backward()
    return value.detach()


class Step(NamedTuple):
    """The results of a training step: the mean loss and both gradients."""

    loss: Tensor
    features: Tensor
    prototypes: Tensor


def exact_step(truth: Objective, inputs: Inputs, rows: int | None = None) -> Step:
    """Loss and gradients in float64; ``rows`` samples at a time, if not all N×C logits fit in memory."""
    n = inputs.features.shape[0]
    prototypes = inputs.prototypes.detach().double().requires_grad_()
    losses, grads = [], []
    for start in range(0, n, rows or n):
        part = slice(start, start + (rows or n))
        features = inputs.features[part].detach().double().requires_grad_()
        loss = truth(Inputs(features, prototypes, inputs.labels[part], inputs.margins.double()))
        loss = loss * (features.shape[0] / n)  # this part's share of the mean over all samples
        loss.backward()
        losses.append(loss.detach())
        grads.append(features.grad)
    if prototypes.grad is None:
        raise RuntimeError("the dense reference leaves no gradient for the prototypes")
    return Step(torch.stack(losses).sum(), torch.cat([grad for grad in grads if grad is not None]), prototypes.grad)


# Relative errors (by norm) beyond these are mistakes. Logits of size s have an error of s·6e-8 in float32, and of
# s·2^-9 in bfloat16 where the dense providers round them. The exponential turns that into a relative error. 2e-4 leaves
# room for long sums, and none for a wrong formula.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def check_step(name: str, loss: Callable[[], Tensor], inputs: Inputs, exact: Step) -> float:
    """Largest relative error (by norm) of loss and gradients; raises RuntimeError if it exceeds the tolerance."""
    tolerance = TOLERANCE[inputs.features.dtype]
    value = run_step(loss, inputs)
    errors = []
    for got, expected in zip((value, inputs.features.grad, inputs.prototypes.grad), exact, strict=True):
        if got is None:
            raise RuntimeError(f"{name}: a gradient is missing; not timed")
        errors.append(float((got.double() - expected).norm() / expected.norm()))
    if not max(errors) < tolerance:
        raise RuntimeError(f"{name}: relative errors {errors} exceed {tolerance}; not timed")
    return max(errors)


def errors_of(checks: Mapping[str, Callable[[], float]], package: str) -> dict[str, str]:
    """The error of each case by name; raises if one is wrong. Cases that are not installed are left out."""
    errors = {name: _error_of(name, check, package) for name, check in checks.items()}
    return {name: f"{error:.1e}" for name, error in errors.items() if error is not None}


def _error_of(name: str, check: Callable[[], float], package: str) -> float | None:
    try:
        return check()
    except ImportError as reason:
        print(f"{name} is left out: {reason} (pip install {package})", flush=True)
        return None
