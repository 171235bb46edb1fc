"""What an update inside the backward cannot do is refused before anything moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.refusals import refused
from torch import Tensor

import ltloss
from ltloss.errors import BackendError
from ltloss.functional import min_angle_regularizer
from ltloss.optim import PrototypeAdamW, PrototypeSGD
from ltloss.testing import problem

FEATURES, _, LABELS = problem(dtype=torch.float32)


def _head() -> tuple[Any, PrototypeSGD]:
    module = ltloss.CosFaceLoss(9, 5)
    return module, PrototypeSGD(module, lr=0.1, momentum=0.9)


def _other_term(module: Any) -> Tensor:
    return module(FEATURES, LABELS) + min_angle_regularizer(module.weight)


def _earlier_term(module: Any) -> Tensor:
    term = (module.weight**2).sum()
    return term + module(FEATURES, LABELS)


def _two_losses(module: Any) -> Tensor:
    return 0.3 * module(FEATURES, LABELS) + 0.7 * module(FEATURES, LABELS.roll(1))


@pytest.mark.parametrize("loss", [_other_term, _earlier_term, _two_losses])
def test_a_backward_that_needs_the_old_prototypes_leaves_them(loss: Callable[[Any], Tensor]) -> None:
    module, optimizer = _head()
    before, state = module.weight.detach().clone(), optimizer.state[module.weight]["momentum_buffer"].clone()
    with refused("PrototypeSGD", error=RuntimeError):
        loss(module).backward()
    assert torch.equal(module.weight, before)
    assert torch.equal(optimizer.state[module.weight]["momentum_buffer"], state)
    with refused("PrototypeSGD.step()", error=RuntimeError):
        optimizer.step()


def test_a_gradient_that_another_backward_left_is_not_forgotten() -> None:
    module, _ = _head()
    (module.weight**2).sum().backward()
    before = module.weight.detach().clone()
    with refused("PrototypeSGD", error=RuntimeError):
        module(FEATURES, LABELS).backward()
    assert torch.equal(module.weight, before)


def test_accumulation_is_refused() -> None:
    module, optimizer = _head()
    module(FEATURES, LABELS).backward()
    moved = module.weight.detach().clone()
    with refused("PrototypeSGD.step()", error=RuntimeError):
        module(FEATURES, LABELS).backward()
    assert torch.equal(module.weight, moved)
    optimizer.step()
    module(FEATURES, LABELS).backward()
    assert not torch.equal(module.weight, moved)


def test_a_second_backward_of_one_graph_is_refused() -> None:
    module, optimizer = _head()
    loss = module(FEATURES, LABELS)
    loss.backward(retain_graph=True)
    moved = module.weight.detach().clone()
    for close in (False, True):
        if close:
            optimizer.step()
        with pytest.raises(RuntimeError):
            loss.backward(retain_graph=True)
        assert torch.equal(module.weight, moved)


def test_a_loss_from_before_the_step_is_refused() -> None:
    module, optimizer = _head()
    early, late = module(FEATURES, LABELS), module(FEATURES, LABELS)
    late.backward()
    optimizer.step()
    moved = module.weight.detach().clone()
    with pytest.raises(RuntimeError):
        early.backward()
    assert torch.equal(module.weight, moved)


def test_losses_that_are_kept_without_a_backward_do_no_harm() -> None:
    module, optimizer = _head()
    kept = []
    for _ in range(3):
        kept.append(module(FEATURES, LABELS))
        module(FEATURES, LABELS).backward()
        optimizer.step()
    assert len({float(loss.detach()) for loss in kept}) == 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["feature", "upstream", "term"])
def test_a_gradient_that_is_not_finite_is_skipped_whole(bad: float, where: str) -> None:
    module = ltloss.LongTailLoss.from_counts([4] * 9, 5, feature_norm_weight=0.0)
    optimizer = PrototypeAdamW(module)
    before = module.weight.detach().clone()
    features = FEATURES.clone()
    if where == "feature":
        features[0, 0] = bad
    if where == "term":
        vars(module)["min_angle_weight"] = bad  # past the check of the option
    loss = module(features, LABELS)
    (loss * bad if where == "upstream" else loss).backward()
    assert torch.equal(module.weight, before)
    assert optimizer.skipped_steps == 1
    assert int(optimizer.state[module.weight]["step"]) == 0
    assert not optimizer.state[module.weight]["exp_avg"].any()
    with pytest.warns(UserWarning, match="1"):
        optimizer.step()
    module.min_angle_weight = 0.1
    module(FEATURES, LABELS).backward()
    optimizer.step()
    assert not torch.equal(module.weight, before)
    assert optimizer.skipped_steps == 1


def test_the_prototypes_are_those_it_was_made_for() -> None:
    module, _ = _head()
    module.weight = torch.nn.Parameter(module.weight.detach().clone())
    with refused("PrototypeSGD", "loss_fn.weight"):
        module(FEATURES, LABELS)


def test_the_dense_reference_is_refused() -> None:
    module, _ = _head()
    with ltloss.use_backend("reference"), refused("reference", error=BackendError):
        module(FEATURES, LABELS)


def test_one_optimizer_a_head_and_one_head_an_optimizer() -> None:
    module, optimizer = _head()
    with refused("PrototypeSGD", "release()"):
        PrototypeAdamW(module)
    with refused("PrototypeSGD"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})


def test_a_state_of_another_head_is_refused_and_changes_nothing() -> None:
    module, optimizer = _head()
    module(FEATURES, LABELS).backward()
    kept = optimizer.state[module.weight]["momentum_buffer"].clone()
    other = PrototypeSGD(ltloss.CosFaceLoss(8, 5), lr=0.7, momentum=0.9)
    with refused("momentum_buffer", "(9, 5)", "(8, 5)"):
        optimizer.load_state_dict(other.state_dict())
    with refused("state_dict", "momentum_buffer", "exp_avg"):
        optimizer.load_state_dict(PrototypeAdamW(ltloss.CosFaceLoss(9, 5)).state_dict())
    assert torch.equal(optimizer.state[module.weight]["momentum_buffer"], kept)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_momentum_without_a_buffer_is_refused() -> None:
    """Schedulers that cycle the momentum set it."""
    module = ltloss.CosFaceLoss(9, 5)
    optimizer = PrototypeSGD(module, lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
    before = module.weight.detach().clone()
    with refused("momentum", "0.95", "PrototypeSGD"):
        module(FEATURES, LABELS).backward()
    assert torch.equal(module.weight, before)
