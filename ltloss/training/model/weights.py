"""Weights of other networks: what a backbone starts with, or is."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ltloss.errors import UserError
from ltloss.training.run.checkpoint import checkpoint_in_use

# Where a network of its own has what ours has: a run of ours, its backbone alone, the timm model in it.
_PREFIXES = ("", "backbone.", "backbone.trunk.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of the checkpoint that a run uses, of a .safetensors or of a state dict that torch saved.

    Of the latter tensors alone are unpickled, also where they lie under ``state_dict`` or ``model``.
    Raises UserError where there is none or it is damaged.
    """
    if path.is_dir():
        checkpoint = checkpoint_in_use(path)
        if checkpoint is None:
            raise UserError(f"{path} is no run with a checkpoint; give one, or a file of weights")
        path = checkpoint / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a run, a .safetensors or a state dict of torch")
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes make of the readers
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, pickle.UnpicklingError):  # of which PyTorch writes a page, and how to run what is in it
            reason = "it is damaged, or holds more than tensors and plain values"
        raise UserError(f"{path} cannot be read ({reason}); give a .safetensors or a state dict of torch") from error
    for name in ("state_dict", "model"):
        found = found.get(name, found) if isinstance(found, Mapping) else found
    tensors = (
        {name: value for name, value in found.items() if isinstance(value, Tensor)}
        if isinstance(found, Mapping)
        else {}
    )
    if not tensors:
        raise UserError(f"{path} holds no tensors by name; give a .safetensors or a state dict of torch")
    return tensors


def load_fitting(network: nn.Module, weights: Mapping[str, Tensor], source: Path) -> tuple[list[str], list[str]]:
    """Copy the weights that fit ``network`` by name and shape, but for those of its head ``loss``.

    The names may be those of the network, or of its backbone alone. Returns the names that were taken, and those that
    were not; UserError where none was.
    """
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("loss.")}
    fits = [
        {
            f"{prefix}{name}": value
            for name, value in weights.items()
            if f"{prefix}{name}" in state and state[f"{prefix}{name}"].shape == value.shape
        }
        for prefix in _PREFIXES
    ]
    best = max(fits, key=len)
    if not best:
        example = next(iter(weights), "none")
        raise UserError(
            f"{source}: none of its {len(weights)} tensors fits the {len(state)} of the backbone by name and shape; "
            f"its first is {example}, the backbone's {next(iter(state), 'none')}. Take the same --backbone"
        )
    network.load_state_dict(best, strict=False)
    return list(best), [name for name in state if name not in best]
