"""The losses and batches on which class-parallel training is compared with one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ltloss
from ltloss import PrototypeHead
from ltloss.distributed import class_mesh, parallelize
from ltloss.distributed.layout import gathered
from ltloss.float8 import FLOAT8, write_rows
from ltloss.testing import FAMILY, MODULES, WITH_LENGTHS, WITH_SUB_CENTERS, long_tail_counts, problem

DIM = 6


class Case(NamedTuple):
    """A loss, and how many samples each rank has in each step."""

    loss: str
    classes: int
    sizes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32


def _module(options: Callable[[int], dict[str, Any]]) -> Callable[..., PrototypeHead]:
    return lambda c, d, **more: ltloss.CombinedMarginLoss(c, d, **options(c), **more)


def _long_tail(**options: Any) -> Callable[..., PrototypeHead]:
    return lambda c, d, **more: ltloss.LongTailLoss.from_counts(long_tail_counts(c), d, **options, **more)


BUILD: dict[str, Callable[..., PrototypeHead]] = {
    **{f"family {name}": _module(options) for name, options in FAMILY.items() if name != "linear"},
    **MODULES,
    **WITH_LENGTHS,
    **WITH_SUB_CENTERS,
    "long-tail of the batch": _long_tail(min_angle_classes="batch", min_angle_weight=2.0),
    "long-tail per sample": _long_tail(reduction="none"),
    "cosine-space ema": lambda c, d, **more: ltloss.CosineSpaceLoss(
        c, d, center_update="ema", truncate="sample", epsilon=0.0, label_smoothing=0.1, **more
    ),
    "cosine-space tight": lambda c, d, **more: ltloss.CosineSpaceLoss(c, d, epsilon=0.0, start_step=1, **more),
}


def build(case: Case) -> PrototypeHead:
    """The module of a case, with the same weights wherever it is built."""
    module = BUILD[case.loss](case.classes, DIM, dtype=case.dtype)
    _, prototypes, _ = problem(1, case.classes * module.sub_centers, DIM, dtype=_wide(case.dtype), seed=7)
    write_rows(module.weight, module.weight_exponent, 0, prototypes.view(module.weight.shape))
    for name, parameter in module.named_parameters(recurse=False):
        if name != "weight":
            parameter.data.copy_(torch.linspace(-1.0, 1.0, case.classes))
    return module


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == FLOAT8 else dtype


def batch(case: Case, step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step; the second sample is ignored."""
    features, _, labels = problem(sum(case.sizes[step]), case.classes, DIM, dtype=_wide(case.dtype), seed=step)
    return features, labels


def part(case: Case, step: int, rank: int) -> slice:
    """The rows of a rank."""
    before = sum(case.sizes[step][:rank])
    return slice(before, before + case.sizes[step][rank])


class Trace(NamedTuple):
    """What one run leaves: losses and feature gradients per step, weight gradient of the first, and the end."""

    losses: list[Tensor]
    feature_grads: list[Tensor]
    weight_grad: Tensor
    weight: Tensor
    state: dict[str, Tensor]
    predicted: tuple[Tensor, Tensor]


def whole(tensor: Tensor) -> Tensor:
    """A DTensor in one piece; any other tensor as it is."""
    return gathered(tensor) if hasattr(tensor, "device_mesh") else tensor.detach().clone()


def trace(case: Case, rank: int | None = None, data: int = 1, **options: Any) -> Trace:
    """Optimizer steps and a prediction, on one rank of a job or, without a rank, in one process."""
    module = build(case)
    if rank is not None:
        module = parallelize(module, class_mesh(data), **options)
    groups = [{"params": [parameter]} for parameter in module.parameters()]  # DTensors apart from others
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)
    losses, grads, first = [], [], torch.empty(0)
    for step in range(len(case.sizes)):
        features, labels = batch(case, step)
        upstream = torch.linspace(-1.0, 2.0, features.shape[0], dtype=case.dtype)
        rows = slice(None) if rank is None else part(case, step, rank)
        mine = features[rows].clone().requires_grad_()
        loss = module(mine, labels[rows])
        optimizer.zero_grad()
        torch.autograd.backward((loss * upstream[rows]).sum() if loss.dim() else loss)
        if step == 0:
            assert module.weight.grad is not None
            first = whole(module.weight.grad)
        assert mine.grad is not None
        losses.append(loss.detach())
        grads.append(mine.grad)
        optimizer.step()
    features, _ = batch(case, 0)
    mine = features if rank is None else features[part(case, 0, rank)]
    best = module.predict(mine, k=min(3, case.classes))
    state = {name: whole(tensor) for name, tensor in module.state_dict().items()}
    return Trace(losses, grads, first, whole(module.weight), state, (best.cosine, best.index))
