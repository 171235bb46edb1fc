"""The optimizers of a run: one over everything, or also one that updates the prototypes inside the backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ltloss.errors import UserError
from ltloss.losses.prototype_head import PrototypeHead
from ltloss.optim import PrototypeAdamW, PrototypeSGD
from ltloss.runtime import current_backend
from ltloss.soft_labels import takes_soft_labels
from ltloss.training.seeds import derived_seed

if TYPE_CHECKING:
    from ltloss.training.run.settings import Settings


_CLASSES: dict[str, tuple[Any, Any]] = {  # for the whole network, and for prototypes inside the backward
    "sgd": (torch.optim.SGD, PrototypeSGD),
    "adamw": (torch.optim.AdamW, PrototypeAdamW),
}


def build_optimizers(network: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """One optimizer over all parameters that learn; with ``settings.fused_update`` another one, last, for prototypes.

    Weight decay acts on biases and normalisation layers only with ``settings.decay_all``. Raises UserError if the
    prototypes of ``network.loss`` cannot be updated inside the backward.
    """
    head = _fused_head(network, settings) if settings.fused_update else None
    parameters = [p for p in network.parameters() if p.requires_grad and (head is None or p is not head.weight)]
    sharded = [p for p in parameters if hasattr(p, "device_mesh")]  # torch does not mix these with others in a group
    decay = settings.weight_decay
    groups = [
        {"params": [p for p in parameters if p.ndim > 1 and p not in set(sharded)], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": decay if settings.decay_all else 0.0},
        {"params": sharded, "weight_decay": decay},
    ]
    groups = [group for group in groups if group["params"]]
    given: dict[str, Any] = {"lr": settings.lr}
    if settings.optimizer == "sgd":
        given["momentum"] = settings.momentum
    whole, in_backward = _CLASSES[settings.optimizer]
    made = [whole(groups, **given)] if groups else []
    if head is not None:
        given |= {"weight_decay": decay, "state_dtype": getattr(torch, settings.state_dtype)}
        given |= {"rounding": settings.rounding_in_force, "seed": derived_seed(settings.seed, "rounding")}
        made.append(in_backward(head, **given))
    return made


def _fused_head(network: nn.Module, settings: Settings) -> PrototypeHead:
    """The head; UserError if its prototypes cannot be updated inside the backward."""
    head = cast(PrototypeHead, network.loss)  # Settings refuse other losses
    if hasattr(head.weight, "device_mesh") and getattr(head, "min_angle_weight", False):
        raise UserError(
            "--fused-update with --parallel class cannot take the gradient of the minimum angle, which crosses the "
            "processes; add --loss-option min_angle_weight=0, or leave --fused-update out"
        )
    if settings.mixup and not takes_soft_labels(head):
        which = "with --parallel class" if hasattr(head.weight, "device_mesh") else f"of --loss {settings.loss}"
        raise UserError(
            f"--fused-update needs one loss per step, and --mixup computes two {which}, the second from prototypes "
            "that would have changed; leave one of them out"
        )
    if current_backend() == "reference":
        raise UserError("--fused-update needs another backend than 'reference'; unset LTLOSS_BACKEND, or leave it out")
    return head
