"""Each optimizer of prototypes does what torch's does on the stored gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import ltloss
from ltloss.optim import PrototypeAdagrad, PrototypeAdamW, PrototypeSGD
from ltloss.testing import MODULES, problem, relative_error

STEPS = 20
PAIRS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SGD": (PrototypeSGD, torch.optim.SGD, {"lr": 0.3}),
    "SGD, momentum, decay": (PrototypeSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    "SGD, dampening": (PrototypeSGD, torch.optim.SGD, {"lr": 0.2, "momentum": 0.8, "dampening": 0.3}),
    "SGD, Nesterov": (PrototypeSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "AdamW": (PrototypeAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW, other betas": (PrototypeAdamW, torch.optim.AdamW, {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-3}),
}


def _train(module: Any, optimizer: torch.optim.Optimizer, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the features."""
    features, _, labels = problem(16, 9, 5, seed=seed, dtype=dtype)
    leaf = features.requires_grad_()
    optimizer.zero_grad()
    loss = module(leaf, labels)
    loss.sum().backward()
    optimizer.step()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", MODULES)
def test_twenty_steps_are_those_of_torch(name: str, pair: str) -> None:
    """In float64, so that nothing but the arithmetic counts; the last steps say that loss and dX agree as well."""
    kind, torchs, options = PAIRS[pair]
    module = MODULES[name](9, 5, dtype=torch.float64)
    stored = copy.deepcopy(module)
    fused, reference = kind(module, **options), torchs([stored.weight], **options)
    start = module.weight.detach().clone()
    for seed in range(STEPS):
        found = _train(module, fused, seed, torch.float64)
        expected = _train(stored, reference, seed, torch.float64)
    assert relative_error(module.weight, start) > 1e-3, "it moved"
    assert relative_error(module.weight, stored.weight) <= 1e-12
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= 1e-12
    assert module.weight.grad is None


@pytest.mark.parametrize("pair", ["SGD, momentum, decay", "AdamW"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"normalize_features": False, "label_smoothing": 0.1}])
def test_in_float32_up_to_its_rounding(pair: str, options: dict[str, Any]) -> None:
    """In slabs: 3000 classes of width 512 are two chunks."""
    kind, torchs, settings = PAIRS[pair]
    torch.manual_seed(0)
    module = ltloss.ArcFaceLoss(3000, 512, scale=16.0, **options)
    stored = copy.deepcopy(module)
    fused, reference = kind(module, **settings), torchs([stored.weight], **settings)
    for seed in range(STEPS):
        features, _, labels = problem(8, 3000, 512, seed=seed, dtype=torch.float32)
        for head, optimizer in ((module, fused), (stored, reference)):
            optimizer.zero_grad()
            head(features, labels).sum().backward()
            optimizer.step()
    # AdamW divides by √v: the rounding of a gradient near 0 may turn the sign of a step, whose length is at most lr.
    allowed = 20 * 2.0**-24 * (1 if pair.startswith("SGD") else 100)
    assert relative_error(module.weight, stored.weight) <= allowed


def test_a_momentum_that_changes_is_torchs() -> None:
    """0 for a while too: the buffer rests then."""
    module = ltloss.CosFaceLoss(9, 5, dtype=torch.float64)
    stored = copy.deepcopy(module)
    fused, reference = PrototypeSGD(module, momentum=0.9), torch.optim.SGD([stored.weight], momentum=0.9)
    for seed, momentum in enumerate((0.9, 0.0, 0.5)):
        for head, optimizer in ((module, fused), (stored, reference)):
            optimizer.param_groups[0]["momentum"] = momentum
            _train(head, optimizer, seed, torch.float64)
    assert relative_error(module.weight, stored.weight) <= 1e-12


def test_adagrad_keeps_one_number_a_class() -> None:
    module = ltloss.CosFaceLoss(9, 5, dtype=torch.float64)
    weight = module.weight.detach().clone()
    total = torch.full((9,), 0.5, dtype=torch.float64)
    optimizer = PrototypeAdagrad(module, lr=0.1, weight_decay=0.02, eps=1e-3, initial_accumulator_value=0.5)
    stored = copy.deepcopy(module)
    for seed in range(5):
        _train(module, optimizer, seed, torch.float64)
        stored.weight.data, stored.weight.grad = weight, None
        features, _, labels = problem(16, 9, 5, seed=seed)
        stored(features, labels).backward()
        for c in range(9):
            gradient = stored.weight.grad[c] + 0.02 * weight[c]
            total[c] += sum(float(g) ** 2 for g in gradient) / 5
            weight[c] -= 0.1 * gradient / (total[c].sqrt() + 1e-3)
    assert relative_error(module.weight, weight) <= 1e-12
    assert relative_error(optimizer.state[module.weight]["sum"], total) <= 1e-12


def test_the_gradient_of_a_class_is_shortened_alone() -> None:
    module = ltloss.CosFaceLoss(9, 5, dtype=torch.float64)
    stored = copy.deepcopy(module)
    optimizer = PrototypeSGD(module, lr=1.0, max_class_norm=0.05)
    before = module.weight.detach().clone()
    _train(module, optimizer, 0, torch.float64)
    features, _, labels = problem(16, 9, 5, seed=0)
    stored(features, labels).backward()
    moved = (before - module.weight.detach()).norm(dim=1)
    assert torch.allclose(moved, stored.weight.grad.norm(dim=1).clamp_max(0.05), rtol=1e-9)
    assert 0 < int((stored.weight.grad.norm(dim=1) > 0.05).sum()) < 9


def test_an_empty_batch_decays_the_weights() -> None:
    module = ltloss.CosFaceLoss(9, 5)
    before = module.weight.detach().clone()
    optimizer = PrototypeSGD(module, lr=0.5, weight_decay=0.1)
    module(torch.zeros(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.int64)).backward()
    optimizer.step()
    assert torch.allclose(module.weight, 0.95 * before)


def test_frozen_features_train_the_head() -> None:
    module = ltloss.CosFaceLoss(9, 5)
    before = module.weight.detach().clone()
    optimizer = PrototypeSGD(module, lr=0.5)
    features, _, labels = problem(dtype=torch.float32)
    module(features, labels).backward()
    optimizer.step()
    assert not torch.equal(module.weight, before)


def test_the_gradient_of_the_features_alone_moves_nothing() -> None:
    module = ltloss.CosFaceLoss(9, 5)
    before = module.weight.detach().clone()
    optimizer = PrototypeSGD(module, lr=0.5)
    features, _, labels = problem(dtype=torch.float32)
    leaf = features.requires_grad_()
    (gradient,) = torch.autograd.grad(module(leaf, labels), leaf)
    assert gradient.any()
    assert torch.equal(module.weight, before)
    with pytest.raises(RuntimeError):
        optimizer.step()


def test_a_released_head_has_gradients_again() -> None:
    module = ltloss.CosFaceLoss(9, 5)
    optimizer = PrototypeSGD(module, lr=0.5)
    optimizer.release()
    features, _, labels = problem(dtype=torch.float32)
    module(features, labels).backward()
    assert module.weight.grad is not None


def test_a_copy_has_gradients() -> None:
    module = ltloss.CosFaceLoss(9, 5)
    PrototypeSGD(module, lr=0.5)
    copied = copy.deepcopy(module)
    features, _, labels = problem(dtype=torch.float32)
    copied(features, labels).backward()
    assert copied.weight.grad is not None
    assert module.fused_update is not None
