"""Checks for a loss module of your own, and the list of losses and problems that the tests of this package use.

:func:`check_loss` is public. The rest serves the tests of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ltloss
from ltloss import functional
from ltloss.class_balance import (
    effective_number_weights,
    inverse_frequency_weights,
    log_prior_from_counts,
    margins_from_counts,
)
from ltloss.losses.defaults import LONG_TAIL_PRIOR
from ltloss.ops._dispatch import IMPLEMENTATIONS

__all__ = ["check_loss"]

Options = Callable[[int], dict[str, Any]]  # number of classes -> keyword arguments of margin_cross_entropy


def long_tail_counts(num_classes: int) -> Tensor:
    """Class counts that fall exponentially from 200 to 2, as in the usual long-tailed benchmarks."""
    position = torch.arange(num_classes, dtype=torch.float64) / max(1, num_classes - 1)
    return (200.0 * 0.01**position).round().long()


def _prior(num_classes: int, tau: float = 1.0) -> Tensor:
    return log_prior_from_counts(long_tail_counts(num_classes), tau)


def _weights(num_classes: int) -> Tensor:
    return effective_number_weights(long_tail_counts(num_classes), beta=0.99)


def _angular(num_classes: int) -> Tensor:
    return margins_from_counts(long_tail_counts(num_classes), 0.8)


def _cosine(num_classes: int) -> Tensor:
    return margins_from_counts(long_tail_counts(num_classes), 0.5, normalize="max")


FAMILY: dict[str, Options] = {
    "cosine_softmax": lambda c: {},
    "cosface": lambda c: {"cosine_margin": 0.35},
    "arcface": lambda c: {"angular_margin": 0.5},
    "arcface_original": lambda c: {"angular_margin": 0.9, "beyond_pi": "arcface"},
    "clipped": lambda c: {"angular_margin": _angular(c) * 4.0 - 0.9, "beyond_pi": "clip"},
    "arcface_large_margin": lambda c: {"angular_margin": 2.0},  # beyond π for half of the samples
    "arcface_straight_through": lambda c: {"angular_margin": 0.5, "margin_gradient": "straight_through"},
    "sphereface": lambda c: {"angle_multiplier": 3.0, "scale": 8.0},
    "combined": lambda c: {"angle_multiplier": 1.2, "angular_margin": 0.3, "cosine_margin": 0.2},
    "ldam": lambda c: {"cosine_margin": _cosine(c)},
    "long_tail": lambda c: {"angular_margin": _angular(c)},
    "balanced_softmax": lambda c: {"log_prior": _prior(c), "scale": 10.0},
    "logit_adjusted": lambda c: {"log_prior": _prior(c, 2.0), "scale": 10.0, "cosine_margin": 0.1},
    "class_weighted": lambda c: {"class_weight": _weights(c), "angular_margin": 0.2},
    "inverse_frequency": lambda c: {"class_weight": inverse_frequency_weights(long_tail_counts(c), 0.5)},
    "label_smoothing": lambda c: {"label_smoothing": 0.1, "cosine_margin": 0.2},
    "feature_length": lambda c: {"normalize_features": False, "angular_margin": 0.3, "scale": 2.0},
    "feature_length_smoothed": lambda c: {"normalize_features": False, "label_smoothing": 0.2, "scale": 3.0},
    "linear": lambda c: {
        "normalize_features": False,
        "normalize_prototypes": False,
        "scale": 1.0,
        "class_weight": _weights(c),
        "label_smoothing": 0.1,
    },
    "sum": lambda c: {"reduction": "sum", "angular_margin": 0.5},
    "per_sample": lambda c: {"reduction": "none", "angular_margin": 0.5, "class_weight": _weights(c)},
    "everything": lambda c: {
        "scale": 12.0,
        "angular_margin": _angular(c),
        "cosine_margin": _cosine(c),
        "angle_multiplier": 1.1,
        "log_prior": _prior(c),
        "class_weight": _weights(c),
        "label_smoothing": 0.05,
    },
}

# Losses whose gradient, by definition, is not the derivative of their value.
NOT_A_DERIVATIVE = {"arcface_straight_through", "AdaFaceLoss"}

MODULES: dict[str, Callable[..., ltloss.PrototypeHead]] = {
    "CosineSoftmaxLoss": ltloss.CosineSoftmaxLoss,
    "CosFaceLoss": ltloss.CosFaceLoss,
    "ArcFaceLoss": ltloss.ArcFaceLoss,
    "CombinedMarginLoss": lambda c, d, **options: ltloss.CombinedMarginLoss(
        c, d, angular_margin=_angular(c), cosine_margin=0.1, angle_multiplier=1.1, **options
    ),
    "LDAMLoss": lambda c, d, **options: ltloss.LDAMLoss.from_counts(long_tail_counts(c), d, **options),
    "LogitAdjustedLoss": lambda c, d, **options: ltloss.LogitAdjustedLoss.from_counts(
        long_tail_counts(c), d, **options
    ),
    "LongTailLoss": lambda c, d, **options: ltloss.LongTailLoss.from_counts(long_tail_counts(c), d, **options),
    "LongTailLoss with prior": lambda c, d, **options: ltloss.LongTailLoss.from_counts(
        long_tail_counts(c), d, **{**LONG_TAIL_PRIOR, **options}
    ),
    "CosineSpaceLoss": ltloss.CosineSpaceLoss,
    "AdaFaceLoss": ltloss.AdaFaceLoss,
    "MagFaceLoss": lambda c, d, **options: ltloss.MagFaceLoss(
        c, d, min_length=1.0, max_length=6.0, penalty_weight=2.0, **options
    ),
    "ElasticFaceLoss": lambda c, d, **options: ltloss.ElasticFaceLoss(c, d, std=0.1, sort=True, **options),
    "CurricularFaceLoss": lambda c, d, **options: ltloss.CurricularFaceLoss(c, d, momentum=0.5, **options),
    "InterclassFilterLoss": lambda c, d, **options: ltloss.InterclassFilterLoss(
        c, d, filter_threshold=0.8, angular_margin=0.3, **options
    ),
}


# Losses in which the length of a prototype matters.
WITH_LENGTHS: dict[str, Callable[..., ltloss.PrototypeHead]] = {
    "LinearSoftmaxLoss": lambda c, d, **options: ltloss.LinearSoftmaxLoss(c, d, log_prior=_prior(c), **options)
}


WITH_SUB_CENTERS: dict[str, Callable[..., ltloss.PrototypeHead]] = {
    "ArcFaceLoss with sub-centres": lambda c, d, **options: ltloss.ArcFaceLoss(
        c, d, margin=_angular(c), **{"sub_centers": 3, **options}
    ),
    "CurricularFaceLoss with sub-centres": lambda c, d, **options: ltloss.CurricularFaceLoss(
        c, d, **{"sub_centers": 2, **options}
    ),
}


class Problem(NamedTuple):
    """Features (N, D), prototypes (C, D) and labels (N,)."""

    features: Tensor
    prototypes: Tensor
    labels: Tensor

    def leaves(self, dtype: torch.dtype | None = None) -> Problem:
        """Return a copy whose features and prototypes require gradients."""
        features, prototypes = (
            tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_() for tensor in self[:2]
        )
        return Problem(features, prototypes, self.labels)


def problem(
    n: int = 7, c: int = 9, d: int = 5, *, dtype: torch.dtype = torch.float64, ignored: bool = True, seed: int = 0
) -> Problem:
    """Make random features and prototypes of differing lengths. With n > 1 the second label is ignored."""
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int) -> Tensor:
        return torch.randn(rows, d, generator=generator, dtype=torch.float64)

    labels = torch.randint(c, (n,), generator=generator)
    if ignored and n > 1:
        labels[1] = -100
    return Problem((1.7 * random(n)).to(dtype), (0.6 * random(c)).to(dtype), labels)


class Outcome(NamedTuple):
    """A loss and the gradients of features and prototypes."""

    loss: Tensor
    features: Tensor
    prototypes: Tensor


def outcome(given: Problem, upstream: Tensor | None = None, *, loss: Any = None, **options: Any) -> Outcome:
    """Compute the loss and both gradients. Per-sample losses get an upstream gradient that varies in size and sign."""
    leaves = given.leaves()
    value = (loss or functional.margin_cross_entropy)(*leaves, **options)
    if upstream is None:
        upstream = torch.ones_like(value)
        if value.dim():
            upstream = torch.linspace(-1.0, 2.0, value.numel(), dtype=value.dtype).view(value.shape)
    grads = torch.autograd.grad((value * upstream).sum(), leaves[:2])
    return Outcome(value.detach(), *grads)


def relative_error(actual: Tensor, exact: Tensor, smallest_size: float = 0.0) -> float:
    """Largest deviation, relative to the largest entry of ``exact`` or to ``smallest_size``, whichever is larger."""
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return 0.0
    actual, exact = actual.detach().double(), exact.detach().double()
    deviation = float(torch.where(actual == exact, 0.0, (actual - exact).abs()).max())  # inf equals inf
    size = max(float(exact.abs().max()), smallest_size)
    return deviation / size if size and deviation else deviation


def assert_same(actual: Outcome, exact: Outcome, tolerance: float, smallest_size: float = 0.0) -> None:
    """Assert that loss and gradients agree, each to ``tolerance`` of its largest entry."""
    for name, one, other in zip(Outcome._fields, actual, exact, strict=True):
        error = relative_error(one, other, smallest_size)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def check_loss(build: Callable[[int, int], nn.Module]) -> None:
    """Check that a loss module keeps the laws that every loss of this package keeps.

    The module is called with features (N, D) and labels (N,), and holds its prototypes (C, D) in ``weight``. The laws:

    * A repeated step gives the same bits.
    * The gradients are the derivatives of the loss (finite differences in float64).
    * A row with the label -100 neither changes the loss nor gets a gradient, even if it holds NaN.
    * bfloat16 changes the result by no more than a few roundings of the logits.
    * An empty batch gives a finite loss and finite gradients.

    Args:
        build: called with C and D, returns the module, with reduction "mean" and without randomness.

    Raises:
        AssertionError: a law does not hold; the message says which.

    See also: :mod:`ltloss.extend`, to write a loss.

    Example:
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.testing import check_loss
        >>> check_loss(lambda num_classes, embedding_size: ArcFaceLoss(num_classes, embedding_size, scale=8.0))
    """
    given = problem()
    for law in (_repeated, _derivative, _ignored_rows, _half_precision, _empty_batch):
        torch.manual_seed(0)
        law(build(given.prototypes.shape[0], given.features.shape[1]), given)


def _step(module: nn.Module, features: Tensor, labels: Tensor) -> Outcome:
    """Compute one step, then restore the state of the module."""
    state = {name: value.clone() for name, value in module.state_dict().items()}
    leaf = features.detach().clone().requires_grad_()
    module.zero_grad()
    loss = module(leaf, labels)
    loss.backward()
    module.load_state_dict(state)
    features_grad, weight_grad = (
        torch.zeros_like(one) if one.grad is None else one.grad for one in (leaf, module.get_parameter("weight"))
    )
    return Outcome(loss.detach(), features_grad, weight_grad)


def _derivative(module: nn.Module, given: Problem) -> None:
    module.double().eval()
    features, weight = (
        given.features.clone().requires_grad_(),
        module.get_parameter("weight").detach().clone().requires_grad_(),
    )

    def loss(features: Tensor, weight: Tensor) -> Tensor:
        value: Tensor = torch.func.functional_call(module, {"weight": weight}, (features, given.labels))
        return value

    holds = torch.autograd.gradcheck(loss, (features, weight), raise_exception=False)
    assert holds, "gradients: they are not the derivatives of the loss"


def _ignored_rows(module: nn.Module, given: Problem) -> None:
    counted = given.labels != -100
    padded = torch.where(counted[:, None], given.features, torch.nan).float()
    found = _step(module, padded, given.labels)
    expected = _step(module, given.features.float()[counted], given.labels[counted])
    assert not found.features[~counted].any(), "ignored rows: they get a gradient"
    shown = found._replace(features=found.features[counted])
    for name, one, other in zip(Outcome._fields, shown, expected, strict=True):
        assert relative_error(one, other) <= 1e-5, f"ignored rows: they change the loss or its gradients ({name})"


def _repeated(module: nn.Module, given: Problem) -> None:
    first, second = (_step(module, given.features.float(), given.labels) for _ in range(2))
    same = all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert same, "repetition: two equal steps give different bits"


def _half_precision(module: nn.Module, given: Problem) -> None:
    module.bfloat16().eval()
    features = given.features.bfloat16()
    found = _step(module, features, given.labels)
    exact = _step(module.double(), features.double(), given.labels)
    for name, one, other in zip(Outcome._fields, found, exact, strict=True):
        # Logits of size s, each rounded to 8 bits.
        allowed = 2.0**-8 * (4.0 + float(getattr(module, "scale", 1.0)))
        assert relative_error(one, other) <= allowed, f"bfloat16: the error of the {name} is no rounding error"


def _empty_batch(module: nn.Module, given: Problem) -> None:
    found = _step(module, given.features[:0].float(), given.labels[:0])
    finite = all(bool(one.isfinite().all()) for one in found)
    assert finite, "an empty batch: the loss or its gradients are not finite"


@contextmanager
def watching(mode: Any) -> Iterator[Any]:
    """Let a TorchDispatchMode see the PyTorch operations inside our operators."""
    with _Inside(mode), mode:
        yield mode


class _Inside(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the implementation of our operators directly, under the watching mode."""

    def __init__(self, mode: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        work = IMPLEMENTATIONS.get(func)
        if work is None:
            return func(*args, **(kwargs or {}))
        with self, self._mode:
            return work(*args)


def copied_prototypes(seed: int) -> tuple[Tensor, Tensor, int, int]:
    """Make random prototypes (C, D) of which two are equal, a query near those, and their indices, lower first."""
    generator = torch.Generator().manual_seed(seed)
    c = int(torch.randint(3, 1400, (1,), generator=generator))
    d = int(torch.randint(16, 300, (1,), generator=generator))  # wide enough for the query to be nearest to the two
    prototypes = torch.randn(c, d, generator=generator)
    low, high = sorted(torch.randperm(c, generator=generator)[:2].tolist())
    prototypes[high] = prototypes[low].clone()
    query = prototypes[low] + 0.3 * torch.randn(d, generator=generator)
    return prototypes, query, low, high


def signs(c: int, seed: int = 0) -> Tensor:
    """Make vectors of 16 entries ±1. Their norm is 4, their cosines are exact in any order of summation, ties abound.

    For general vectors the rule "the lowest index wins" holds for bitwise equal copies only (``chunked.equal_rows``).
    A matrix product sums differently at its edges, so cosines that are equal in exact arithmetic may differ.
    """
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(2, (c, 16), generator=generator) * 2 - 1).float()


def lowest_nearest(prototypes: Tensor) -> tuple[list[int], list[float]]:
    """Find the nearest prototype of each by integer arithmetic, one row at a time: indices and cosines."""
    index, cosine = [], []
    for i, row in enumerate((prototypes.long() @ prototypes.long().t()).tolist()):
        row[i] = -99
        index.append(row.index(max(row)))
        cosine.append(max(row) / 16)
    return index, cosine
