"""In a training loop: schedulers, checkpoints, scaled losses, compiled forwards, samples of the classes."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from helpers.prototype_steps import train_steps
from helpers.refusals import refused
from torch import Tensor, nn

import ltloss
from ltloss.distributed import SampledAdamW, SampledSGD, parallelize
from ltloss.optim import PrototypeAdagrad, PrototypeAdamW, PrototypeSGD
from ltloss.testing import problem, relative_error

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda m, **o: PrototypeSGD(m, lr=0.1, momentum=0.9, weight_decay=0.01, **o),
    "AdamW": lambda m, **o: PrototypeAdamW(m, lr=0.01, **o),
    "Adagrad": lambda m, **o: PrototypeAdagrad(m, lr=0.1, **o),
}


@pytest.mark.parametrize(
    "options", [{}, {"state_dtype": torch.bfloat16}, {"rounding": "stochastic"}, {"rounding": "kahan"}]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_from_a_file_it_takes_the_same_steps(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = ltloss.ArcFaceLoss(9, 20, dtype=torch.bfloat16 if "rounding" in options else None)
    optimizer = OPTIMIZERS[name](module, seed=5, **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    train_steps(module, optimizer, range(3), scheduler)
    file = io.BytesIO()
    torch.save([one.state_dict() for one in (module, optimizer, scheduler)], file)
    train_steps(module, optimizer, range(3, 6), scheduler)
    file.seek(0)
    again = ltloss.ArcFaceLoss(9, 20, dtype=module.weight.dtype)
    resumed = OPTIMIZERS[name](again, **options)
    rest = torch.optim.lr_scheduler.CosineAnnealingLR(resumed, 6)
    for one, state in zip((again, resumed, rest), torch.load(file), strict=True):
        one.load_state_dict(state)
    train_steps(again, resumed, range(3, 6), rest)
    assert torch.equal(again.weight, module.weight)
    for key, tensor in optimizer.state[module.weight].items():
        assert tensor.dtype == resumed.state[again.weight][key].dtype, key
        assert torch.equal(tensor, resumed.state[again.weight][key]), key


def test_a_scheduler_and_a_learning_rate_in_a_tensor() -> None:
    torch.manual_seed(0)
    start = ltloss.ArcFaceLoss(9, 5)
    weights = []
    for make in (lambda m: torch.optim.SGD([m.weight], lr=0.5), lambda m: PrototypeSGD(m, lr=torch.tensor(0.5))):
        module = copy.deepcopy(start)
        optimizer = make(module)
        train_steps(module, optimizer, range(4), torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1))
        weights.append(module.weight)
    assert relative_error(weights[1], weights[0]) < 1e-6


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_scale_of_a_grad_scaler_is_divided_out(name: str) -> None:
    torch.manual_seed(0)
    start = ltloss.LongTailLoss.from_counts([5, 4, 3, 2, 2, 2, 1, 1, 1], 5)
    backbone = nn.Linear(5, 5)
    weights = []
    for scaled in (False, True):
        module, body = copy.deepcopy(start), copy.deepcopy(backbone)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, enabled=scaled)
        head = OPTIMIZERS[name](module, grad_scaler=scaler)
        rest = torch.optim.SGD(body.parameters(), lr=0.1)
        for seed in range(6):
            features, _, labels = problem(12, 9, 5, seed=seed, dtype=torch.float32)
            if seed == 3 and scaled:  # a step that overflows moves neither, and lowers the scale
                before = module.weight.detach().clone()
                scaler.scale(module(body(features * torch.inf), labels)).backward()
                scaler.step(head)
                scaler.step(rest)
                scaler.update()
                rest.zero_grad()
                assert torch.equal(module.weight, before)
                assert head.skipped_steps == 1
            rest.zero_grad()
            scaler.scale(module(body(features), labels)).backward()
            scaler.step(head)
            scaler.step(rest)
            scaler.update()
        weights.append(torch.cat([module.weight.detach().ravel(), *(p.detach().ravel() for p in body.parameters())]))
    assert relative_error(weights[1], weights[0]) < 1e-5


def test_a_grad_scaler_that_it_was_not_given_is_refused() -> None:
    module = ltloss.CosFaceLoss(9, 5)
    optimizer, scaler = PrototypeSGD(module, lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    features, _, labels = problem(dtype=torch.float32)
    scaler.scale(module(features, labels)).backward()
    with refused("grad_scaler", "GradScaler", "None", error=RuntimeError):
        scaler.step(optimizer)
    optimizer.step()  # without a scaler it goes on
    module(features, labels).backward()
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)


def test_a_closure_and_the_rest_of_the_network() -> None:
    torch.manual_seed(0)
    module, body = ltloss.CosFaceLoss(9, 5), nn.Linear(5, 5)
    optimizer = PrototypeSGD(module, lr=0.5)
    features, _, labels = problem(dtype=torch.float32)

    def closure() -> float:
        loss = module(body(features), labels)
        loss.backward()
        return float(loss.detach())

    losses = [optimizer.step(closure) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert body.weight.grad is not None


@pytest.mark.compile
def test_a_compiled_forward_takes_the_same_steps() -> None:
    torch.manual_seed(0)
    start, start_body = ltloss.LongTailLoss.from_counts([5, 4, 3, 2, 2, 2, 1, 1, 1], 5), nn.Linear(5, 5)
    weights = []
    for compiled in (False, True):
        module, body = copy.deepcopy(start), copy.deepcopy(start_body)
        optimizer = PrototypeAdamW(module)

        def forward(features: Tensor, labels: Tensor, module: Any = module, body: Any = body) -> Tensor:
            return module(body(features).relu(), labels)

        run = torch.compile(forward) if compiled else forward
        for seed in range(3):
            features, _, labels = problem(12, 9, 5, seed=seed, dtype=torch.float32)
            run(features, labels).backward()
            optimizer.step()
        weights.append(module.weight)
    assert relative_error(weights[1], weights[0]) < 1e-5


@pytest.mark.parametrize(
    ("make", "rowwise"),
    [
        (lambda m: PrototypeSGD(m, lr=0.1, momentum=0.9, weight_decay=0.01), lambda m: SampledSGD(m, 0.1, 0.9, 0.01)),
        (lambda m: PrototypeAdamW(m, lr=0.01), lambda m: SampledAdamW(m, lr=0.01)),
    ],
)
def test_of_a_sample_only_the_drawn_classes_move(make: Any, rowwise: Any) -> None:
    """As the optimizers over rows with a gradient do it, whose draws are the same."""
    torch.manual_seed(0)
    start = ltloss.CosFaceLoss(200, 8, scale=8.0)
    weights = []
    for kind in (make, rowwise):
        module = parallelize(copy.deepcopy(start), None, sample_rate=0.1)
        optimizer = kind(module)
        moved = []
        for seed in range(4):
            before = module.weight.detach().clone()
            train_steps(module, optimizer, range(seed, seed + 1))
            moved.append((module.weight.detach() != before).any(1))
        assert all(10 <= int(rows.sum()) <= 24 for rows in moved)
        assert len({tuple(rows.tolist()) for rows in moved}) == 4
        weights.append(module.weight)
    assert relative_error(weights[0], weights[1]) < 1e-6
