"""Read the weights of other networks, for a backbone to start with or to use unchanged."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ltloss.errors import UserError, in_one_line
from ltloss.training.run.checkpoint import checkpoint_in_use

# Prefixes in our classifier under which a file's tensors may fit: a whole run, a backbone, the timm model in one.
_PREFIXES = ("", "backbone.", "backbone.trunk.")


def weights_file(path: Path) -> Path:
    """The file of the weights that a run, or the path of a file, names. UserError if there is none."""
    if path.is_dir():
        checkpoint = checkpoint_in_use(path)
        if checkpoint is None:
            raise UserError(f"{path} is no run with a checkpoint; give one, or a file of weights")
        path = checkpoint / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a run, a .safetensors or a state dict of torch")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a run's checkpoint, of a .safetensors file, or of a state dict that torch saved.

    A state dict may be under the key ``state_dict`` or ``model``; only tensors and plain values are unpickled. Raises
    UserError if there are no tensors or the file is damaged.
    """
    path = weights_file(path)
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes make of the readers
        reason = in_one_line(error, 200)
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
    """Copy the weights that fit ``network`` by name and shape, without those of its head ``loss``.

    The names may be those of the network, or of its backbone alone. Returns the names of the tensors that were set, and
    of those that were not. UserError if none was.
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
