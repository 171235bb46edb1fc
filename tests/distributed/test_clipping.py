"""Clipping and loss scaling over a backbone and a head, on ranks and in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import world
from helpers.cases import DIM, Case, batch, build, part, whole
from helpers.refusals import refused
from torch import nn
from torch.distributed.fsdp import fully_shard

from ltloss.distributed import class_mesh, clip_grad_norm_, parallelize
from ltloss.distributed.layout import local
from ltloss.testing import relative_error

pytestmark = pytest.mark.slow

CASE = Case("CosFaceLoss", 11, ((4, 4),))


def _models(rank: int | None, wrap: str = "none", data: int = 1) -> tuple[Any, Any]:
    torch.manual_seed(3)
    backbone: Any = nn.Sequential(nn.Linear(DIM, 5), nn.Tanh(), nn.Linear(5, DIM))
    head = build(CASE)
    if rank is not None:
        head = parallelize(head, class_mesh(data), averaged_backbone=True)
        if wrap == "ddp":
            backbone = nn.parallel.DistributedDataParallel(backbone)
        else:
            fully_shard(backbone, mesh=class_mesh())
    return backbone, head


def _backward(backbone: Any, head: Any, rank: int | None) -> list[torch.Tensor]:
    rows = slice(None) if rank is None else part(CASE, 0, rank)
    features, labels = batch(CASE, 0)
    torch.autograd.backward(head(backbone(features[rows]), labels[rows]))
    return [*backbone.parameters(), *head.parameters()]


def _clipped(rank: int) -> list[tuple[str, float, float, list[torch.Tensor], list[str]]]:
    found = []
    for wrap in ("ddp", "fsdp"):
        for data in (1, 2):
            for max_norm in (0.01, 100.0):
                parameters = _backward(*_models(rank, wrap, data), rank)
                with world.Collectives() as counted:
                    norm = clip_grad_norm_(parameters, max_norm)
                gradients = [whole(p.grad) for p in parameters if p.grad is not None]
                found.append((f"{wrap} {data}", max_norm, float(norm), gradients, counted.calls))
    return found


def test_the_norm_is_that_of_one_process() -> None:
    for found in world.run(_clipped, 2):
        for name, max_norm, norm, gradients, calls in found:
            parameters = _backward(*_models(None), None)
            expected = nn.utils.clip_grad_norm_(parameters, max_norm)
            assert abs(norm - float(expected)) <= 1e-5 * float(expected)
            for ours, theirs in zip(gradients, parameters, strict=True):
                assert relative_error(ours, theirs.grad) <= 2e-5, (name, max_norm)
            # One for each mesh dimension that something is sharded over; of two data groups each has all classes.
            assert calls == ["allreduce"] * (name != "ddp 2"), name


def test_in_one_process_it_is_that_of_torch() -> None:
    ours, theirs = (_backward(*_models(None), None) for _ in range(2))
    norm = clip_grad_norm_(iter(ours), 0.01)
    torch.testing.assert_close(norm.float(), nn.utils.clip_grad_norm_(theirs, 0.01))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert float(clip_grad_norm_(nn.Linear(2, 2).parameters(), 1.0)) == 0.0
    assert float(clip_grad_norm_([], 1.0)) == 0.0
    with refused("max_norm", "-1.0"):
        clip_grad_norm_(ours, -1.0)


def test_half_precision_gradients_do_not_overflow() -> None:
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    weight.grad = torch.full((4,), 1000.0, dtype=torch.float16)
    assert float(clip_grad_norm_(weight, 1.0)) == 2000.0
    torch.testing.assert_close(weight.grad, torch.full((4,), 0.5, dtype=torch.float16))


def _frozen_on_one_rank(rank: int) -> float:
    backbone, head = _models(rank, "ddp")
    parameters = _backward(backbone, head, rank)
    if rank == 1:
        head.weight.grad = None
    return float(clip_grad_norm_(parameters, 1.0))


def test_a_rank_without_a_gradient_takes_part() -> None:
    first, second = world.run(_frozen_on_one_rank, 2)
    assert first == second > 0


def _overflowing(rank: int) -> list[tuple[float, bool, bool]]:
    """An overflow in one rank's classes: the scale of every rank, and whether head and backbone stayed."""
    found = []
    for wrap in ("ddp", "fsdp"):
        for bad in (0, 1):
            modules = _models(rank, wrap)
            optimizers = [torch.optim.AdamW(module.parameters(), fused=True) for module in modules]
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            scaler.scale(torch.zeros(()))
            parameters = _backward(*modules, rank)
            if rank == bad:
                local(modules[1].weight.grad)[0, 0] = torch.inf
            before = [local(parameter).clone() for parameter in parameters]
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            stayed = [torch.equal(local(new), old) for new, old in zip(parameters, before, strict=True)]
            found.append((scaler.get_scale(), stayed[-1], any(stayed[:-1])))
    return found


def test_a_grad_scaler_sees_an_overflow_of_any_rank() -> None:
    assert world.run(_overflowing, 2) == [[(4.0, True, False)] * 4] * 2
