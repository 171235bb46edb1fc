"""The one route of the loss: the backend of the forward, saved tensors, extreme lengths, targets near a half turn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ltloss
from ltloss import functional, reference
from ltloss.functional import margin_cross_entropy
from ltloss.testing import MODULES, WITH_LENGTHS, WITH_SUB_CENTERS, problem, relative_error

ALL = MODULES | WITH_LENGTHS | WITH_SUB_CENTERS


class Operators(TorchDispatchMode):
    """Those of ours that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ltloss":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_backward_takes_the_backend_of_the_forward() -> None:
    given = problem().leaves()
    with ltloss.use_backend("torch"):
        loss = margin_cross_entropy(*given, angular_margin=0.3)
    with ltloss.use_backend("reference"), Operators() as seen:
        loss.backward()
    assert seen.names == ["ltloss::logsumexp_gradients_torch"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    module = ALL[name](9, 5).double().eval()
    features, _, labels = problem()
    results = []
    for checkpointed in (False, True):
        module.zero_grad()
        leaf = features.clone().requires_grad_()
        loss = checkpoint(module, leaf, labels, use_reentrant=reentrant) if checkpointed else module(leaf, labels)
        loss.backward()
        results.append((loss.detach(), leaf.grad, module.weight.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_zero_feature_that_keeps_its_length_gets_no_gradient(backend: str) -> None:
    features, prototypes, labels = problem(ignored=False)
    features[2] = 0.0
    leaf = features.requires_grad_()
    with ltloss.use_backend(backend):
        loss = margin_cross_entropy(leaf, prototypes, labels, normalize_features=False, scale=2.0, angular_margin=0.3)
        loss.backward()
    assert torch.equal(leaf.grad[2], torch.zeros(5, dtype=torch.float64))


def test_lengths_whose_squares_leave_the_range() -> None:
    features, prototypes, labels = problem(ignored=False, dtype=torch.float32)
    huge = (features / features.norm(dim=1, keepdim=True) * 3e19).requires_grad_()
    loss = margin_cross_entropy(huge, prototypes, labels, normalize_features=False, scale=1e-19, cosine_margin=0.1)
    exact = reference.margin_cross_entropy(
        huge.detach().double(), prototypes.double(), labels, normalize_features=False, scale=1e-19, cosine_margin=0.1
    )
    assert relative_error(loss, exact) <= 1e-5
    loss.backward()
    assert huge.grad.isfinite().all()


def test_a_target_near_a_half_turn_is_as_exact_as_float32_allows() -> None:
    """The rounding of the cosine is magnified by 1/sin θ: it is taken in float64, and nothing else is lost."""
    angle = math.pi - torch.linspace(0.0005, 0.003, 64, dtype=torch.float64)
    features = torch.stack([angle.cos(), angle.sin()], 1).float()
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    labels = torch.zeros(64, dtype=torch.int64)
    options = {"scale": 16.0, "angular_margin": 0.3, "reduction": "none"}
    exact = functional.margin_cross_entropy(features.double(), prototypes.double(), labels, **options)
    assert relative_error(functional.margin_cross_entropy(features, prototypes, labels, **options), exact) <= 2e-7
