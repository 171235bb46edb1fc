"""The state of a run's optimizers, as the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltloss.optim import PrototypeSGD
from ltloss.optim.prototype_optimizer import PrototypeOptimizer
from ltloss.training.model.classifier import check_tensors
from ltloss.training.run.ranks import copy_to_shard

_Parameters = Mapping[str, Tensor]  # by name


def state_tensors(optimizers: Sequence[torch.optim.Optimizer], parameters: _Parameters) -> dict[str, Tensor]:
    """The state by its names in a checkpoint: PARAMETER for a momentum buffer, PARAMETER.KEY for all else."""
    return {
        _stored_name(name, key): tensor
        for name, parameter, optimizer in _moved(optimizers, parameters)
        for key, tensor in optimizer.state[parameter].items()
        if tensor is not None and not _follows(optimizer, key)
    }


def load_state(
    optimizers: Sequence[torch.optim.Optimizer], parameters: _Parameters, kept: Mapping[str, Tensor], path: Path
) -> None:
    """Fill the state with the tensors ``kept``, read from ``path``; UserError names the first that does not fit."""
    states = [(optimizer, p, name, _state(optimizer, p)) for name, p, optimizer in _moved(optimizers, parameters)]
    wanted = {
        _stored_name(name, key): tensor
        for optimizer, _, name, state in states
        for key, tensor in state.items()
        if not _follows(optimizer, key)
    }
    check_tensors(path, kept, wanted)
    for name, tensor in wanted.items():
        copy_to_shard(tensor, kept[name])
    for optimizer, parameter, _, state in states:
        optimizer.state[parameter].update(state)


def set_steps(optimizers: Sequence[torch.optim.Optimizer], steps: int) -> None:
    """Set the number of steps of PrototypeSGD, which no checkpoint holds; its first step initialises the momentum."""
    for optimizer in optimizers:
        if isinstance(optimizer, PrototypeSGD):
            optimizer.state[optimizer.weight]["step"].fill_(steps)


def _moved(
    optimizers: Sequence[torch.optim.Optimizer], parameters: _Parameters
) -> Iterator[tuple[str, Tensor, torch.optim.Optimizer]]:
    """Each parameter that an optimizer moves: its name, itself, and the optimizer."""
    owners = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return ((name, p, owners[p]) for name, p in parameters.items() if p in owners)


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The state of a parameter as it is before the first step: zeros, or what a fused optimizer holds."""
    if isinstance(optimizer, PrototypeOptimizer):
        return dict(optimizer.state[parameter])
    if isinstance(optimizer, torch.optim.AdamW):
        moments = {key: _zeros(parameter) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.tensor(0.0), **moments}
    return {"momentum_buffer": _zeros(parameter)} if optimizer.param_groups[0]["momentum"] else {}


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, requires_grad=False)


def _stored_name(parameter: str, key: str) -> str:
    return parameter if key == "momentum_buffer" else f"{parameter}.{key}"


def _follows(optimizer: torch.optim.Optimizer, key: str) -> bool:
    """Whether an entry follows from the number of epochs, so that it is not stored."""
    return key == "step" and isinstance(optimizer, PrototypeSGD)
