"""What makes a sampled head draw other classes: a step of an optimizer over its weight, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import world
from helpers.cases import DIM
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ltloss
from ltloss.distributed import SampledAdamW, SampledSGD, class_mesh, load_checkpoint, parallelize, save_checkpoint
from ltloss.distributed.layout import local
from ltloss.testing import problem

CLASSES = 40
LABELS = torch.tensor([3, 7, 12, 39])

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda head: torch.optim.SGD([head.weight], lr=0.1, foreach=False),
    "SGD foreach": lambda head: torch.optim.SGD([head.weight], lr=0.1, foreach=True),
    "AdamW foreach": lambda head: torch.optim.AdamW([head.weight], lr=0.1, foreach=True),
    "AdamW fused": lambda head: torch.optim.AdamW([head.weight], lr=0.1, fused=True),
    "SampledSGD": lambda head: SampledSGD(head, lr=0.1),
    "SampledAdamW": lambda head: SampledAdamW(head, lr=0.1),
}


def _head(**options: Any) -> Any:
    head = ltloss.CosFaceLoss(CLASSES, DIM, scale=8.0)
    head.load_state_dict({"weight": problem(1, CLASSES, DIM, dtype=torch.float32, seed=3)[1]})
    return parallelize(head, class_mesh(), sample_rate=0.25, **options)


def _features(seed: int = 0) -> Tensor:
    return problem(LABELS.numel(), CLASSES, DIM, dtype=torch.float32, seed=seed)[0]


def _backward(head: Any, labels: Tensor = LABELS, call: Callable[..., Tensor] | None = None) -> tuple[int, ...]:
    """Backward of one batch; the local classes that it drew."""
    head.weight.grad = None
    torch.autograd.backward((call or head)(_features()[: labels.numel()].requires_grad_(), labels))
    return tuple(local(head.weight.grad).any(1).nonzero()[:, 0].tolist())


def _two_steps(rank: int = 0) -> dict[str, int]:
    """How many different draws two steps with the same labels have."""
    found = {}
    for name, make in OPTIMIZERS.items():
        head = _head()
        optimizer = make(head)
        drawn = []
        for _ in range(2):
            drawn.append(_backward(head))
            optimizer.step()
        found[name] = len(set(drawn))
    return found


@pytest.mark.parametrize("ranks", [0, 1, 2])
def test_every_step_draws_other_classes(ranks: int) -> None:
    """In one process that initialised nothing, and with the weight a DTensor."""
    for found in world.run(_two_steps, ranks) if ranks else [_two_steps()]:
        assert found == dict.fromkeys(OPTIMIZERS, 2)


def _other_steps(rank: int = 0) -> list[tuple[int, ...]]:
    head, backbone = _head(), nn.Linear(2, 2)
    copied = copy.deepcopy(head)
    drawn = [_backward(head)]
    for other in (backbone.weight, copied.weight):
        other.grad = torch.zeros_like(other)
        torch.optim.SGD([other], lr=0.1).step()
        drawn.append(_backward(head))
    with torch.no_grad():
        head.weight.mul_(1.0)  # clipping of the weight is no step
    return [*drawn, _backward(head)]


def test_steps_of_other_parameters_change_nothing() -> None:
    assert len(set(_other_steps())) == 1


def test_micro_batches_of_a_step() -> None:
    """Other labels draw other classes; the same labels draw the same until the step."""
    head = _head()
    optimizer = torch.optim.AdamW(head.parameters(), fused=True)
    drawn = [_backward(head, labels) for labels in (LABELS[:2], LABELS[2:], LABELS[:2])]
    assert drawn[0] != drawn[1]
    assert drawn[0] == drawn[2]
    optimizer.step()
    assert _backward(head, LABELS[:2]) not in drawn


def _recomputed(rank: int, reentrant: bool) -> list[bool]:
    same = []
    for make in OPTIMIZERS.values():
        plain, again = _head(), _head()
        optimizers = make(plain), make(again)

        def call(*given: Tensor, head: Any = again) -> Tensor:
            return checkpoint(head, *given, use_reentrant=reentrant)  # type: ignore[no-any-return]

        for _ in range(2):
            same.append(_backward(plain) == _backward(again, call=call))
            same.append(torch.equal(local(plain.weight.grad), local(again.weight.grad)))
            for optimizer in optimizers:
                optimizer.step()
    return same


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_draws_the_same(reentrant: bool) -> None:
    for same in world.run(_recomputed, 2, reentrant):
        assert all(same)


def test_recomputations_between_forwards_draw_the_same() -> None:
    """As a pipeline schedules them: the second forward comes before the first is computed again, the third after it."""
    grads = []
    for checkpointed in (False, True):
        head = _head()
        given = [(_features(seed).requires_grad_(), LABELS.roll(seed)) for seed in range(3)]
        losses = []
        for number, one in enumerate(given):
            losses.append(checkpoint(head, *one, use_reentrant=False) if checkpointed else head(*one))
            if number:
                losses[number - 1].backward()
        losses[-1].backward()
        grads.append(head.weight.grad)
    torch.testing.assert_close(*grads)


def _resumed(rank: int, folder: Path) -> list[bool]:
    same = []
    for number, make in enumerate(OPTIMIZERS.values()):
        drawn: list[list[tuple[int, ...]]] = [[], []]
        head = _head()
        optimizer = make(head)
        for step in range(4):
            if step == 2:
                save_checkpoint(folder / str(number), {"head": head}, {"head": optimizer})
            drawn[0].append(_backward(head))
            optimizer.step()
        head = _head()
        optimizer = make(head)
        load_checkpoint(folder / str(number), {"head": head}, {"head": optimizer})
        for _ in range(2):
            drawn[1].append(_backward(head))
            optimizer.step()
        same.append(drawn[0][2:] == drawn[1] and len(set(drawn[0])) == 4)
    return same


def test_a_resumed_training_goes_on_with_its_draws(tmp_path: Path) -> None:
    for same in world.run(_resumed, 2, tmp_path):
        assert all(same)


def test_a_step_that_a_grad_scaler_skips_does_no_harm() -> None:
    head = _head()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before, weight = _backward(head), head.weight.detach().clone()
    scaler.scale(torch.zeros(()))
    head.weight.grad[3, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(head.weight, weight)
    assert _backward(head) == before
    scaler.step(optimizer)
    assert not torch.equal(head.weight, weight)
    assert _backward(head) != before


def test_a_training_without_optimizer_counts_by_hand() -> None:
    head = _head()
    drawn = [_backward(head)]
    head.sampler.step += 1
    assert _backward(head) not in drawn
