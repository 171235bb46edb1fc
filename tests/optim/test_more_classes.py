"""An optimizer goes on with a head that got more classes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.prototype_steps import train_steps
from helpers.refusals import refused
from torch import Tensor

import ltloss
from ltloss.distributed import add_classes, parallelize
from ltloss.optim import PrototypeAdagrad, PrototypeAdamW, PrototypeSGD
from ltloss.testing import problem, relative_error

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda m, **o: PrototypeSGD(m, lr=0.5, momentum=0.9, weight_decay=0.01, **o),
    "AdamW": lambda m, **o: PrototypeAdamW(m, lr=0.1, **o),
    "Adagrad": lambda m, **o: PrototypeAdagrad(m, lr=0.5, initial_accumulator_value=0.25, **o),
}
TORCH: dict[str, Callable[[Tensor], torch.optim.Optimizer]] = {
    "SGD": lambda w: torch.optim.SGD([w], lr=0.5, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda w: torch.optim.AdamW([w], lr=0.1),
}


@pytest.mark.parametrize("name", TORCH)
def test_it_goes_on_as_torch_does_with_state_that_was_padded(name: str) -> None:
    torch.manual_seed(0)
    head = ltloss.CosFaceLoss(9, 5)
    twin = copy.deepcopy(head)
    optimizer, theirs = OPTIMIZERS[name](head), TORCH[name](twin.weight)
    train_steps(head, optimizer, range(3))
    train_steps(twin, theirs, range(3))
    larger = add_classes(head, 4)
    optimizer.take_over(larger)
    twin_larger = copy.deepcopy(larger)
    padded = TORCH[name](twin_larger.weight)
    for key, tensor in theirs.state[twin.weight].items():
        rows = torch.nn.functional.pad(tensor, (0, 0, 0, 4)) if tensor.dim() else tensor
        padded.state[twin_larger.weight][key] = rows
    train_steps(larger, optimizer, range(3, 7))
    train_steps(twin_larger, padded, range(3, 7))
    assert relative_error(larger.weight, twin_larger.weight) < 1e-5


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}, {"rounding": "kahan"}])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_old_classes_keep_their_state(name: str, options: dict[str, Any]) -> None:
    head = ltloss.CosFaceLoss(9, 5, dtype=torch.bfloat16 if "rounding" in options else None)
    optimizer = OPTIMIZERS[name](head, **options)
    fresh = OPTIMIZERS[name](ltloss.CosFaceLoss(4, 5, dtype=head.weight.dtype), **options)
    train_steps(head, optimizer, range(3))
    before = {key: tensor.clone() for key, tensor in optimizer.state[head.weight].items()}
    larger = add_classes(head, 4)
    optimizer.take_over(larger)
    assert list(optimizer.state) == [larger.weight]
    for key, tensor in optimizer.state[larger.weight].items():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor[:9] if tensor.dim() else tensor, before[key])
        if tensor.dim():
            assert torch.equal(tensor[9:], fresh.state[fresh.weight][key])


def test_schedulers_stay_and_the_former_head_is_free() -> None:
    head = ltloss.CosFaceLoss(9, 5)
    optimizer = PrototypeSGD(head, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    train_steps(head, optimizer, range(3), scheduler)
    larger = add_classes(head, 1)
    optimizer.take_over(larger)
    train_steps(larger, optimizer, range(3, 5), scheduler)
    assert optimizer.param_groups[0]["lr"] == 0.25
    features, _, labels = problem(12, 9, 5, dtype=torch.float32)
    kept = larger.weight.detach().clone()
    head(features, labels).backward()
    assert head.weight.grad is not None
    assert torch.equal(larger.weight, kept)


def test_a_loss_from_before_is_refused() -> None:
    head = ltloss.CosFaceLoss(9, 5)
    optimizer = PrototypeSGD(head)
    features, _, labels = problem(12, 9, 5, dtype=torch.float32)
    loss = head(features, labels)
    larger = add_classes(head, 1)
    optimizer.take_over(larger)
    former, kept = head.weight.detach().clone(), larger.weight.detach().clone()
    with pytest.raises(RuntimeError):
        loss.backward()
    assert torch.equal(head.weight, former)
    assert torch.equal(larger.weight, kept)


def test_drawn_classes_are_counted_on() -> None:
    head = parallelize(ltloss.CosFaceLoss(200, 8), None, sample_rate=0.1)
    optimizer = PrototypeAdamW(head)
    train_steps(head, optimizer, range(3))
    draws = optimizer.state[head.weight]["draws"].clone()
    larger = add_classes(head, 50)
    optimizer.take_over(larger)
    assert torch.equal(optimizer.state[larger.weight]["draws"], torch.cat([draws, torch.zeros(50)]))
    train_steps(larger, optimizer, range(3, 5))
    assert float(optimizer.state[larger.weight]["draws"].sum()) > float(draws.sum())


def _owned() -> ltloss.CosFaceLoss:
    head = ltloss.CosFaceLoss(12, 5)
    PrototypeAdamW(head)
    return head


@pytest.mark.parametrize(
    ("make", "facts", "error"),
    [
        (lambda: ltloss.CosFaceLoss(12, 6), ("add_classes", "(9, 5)", "(12, 6)"), ValueError),
        (lambda: ltloss.CosFaceLoss(8, 5), ("add_classes", "(9, 5)", "(8, 5)"), ValueError),
        (lambda: ltloss.CosFaceLoss(12, 5, dtype=torch.bfloat16), ("torch.float32", "torch.bfloat16"), ValueError),
        (_owned, ("PrototypeAdamW", "release()"), ValueError),
        (lambda: torch.nn.Linear(5, 12), ("Linear",), TypeError),
    ],
)
def test_another_head_is_refused_and_nothing_changes(make: Any, facts: tuple[str, ...], error: Any) -> None:
    head = ltloss.CosFaceLoss(9, 5)
    optimizer = PrototypeSGD(head, lr=0.1, momentum=0.9)
    with refused(*facts, error=error):
        optimizer.take_over(make())
    before = head.weight.detach().clone()
    train_steps(head, optimizer, range(1))
    assert not torch.equal(head.weight, before)
