"""One run on several processes: ``torchrun -m ltloss train --parallel class``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltloss.errors import UserError
from ltloss.training.run.checkpoint import latest_checkpoint

if TYPE_CHECKING:
    from ltloss.training.model.classifier import Classifier


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among those of the run. Only the first rank writes files."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the first rank, which writes files."""
        return self.rank == 0

    def purpose(self, name: str) -> str:
        """The purpose of a random stream that differs between ranks."""
        return name if self.count == 1 else f"{name} of rank {self.rank} of {self.count}"

    def wait(self) -> None:
        """Wait until all ranks have called this."""
        if self.count > 1:
            dist.barrier()

    def sum(self, number: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.count > 1:
            dist.all_reduce(number)
        return number

    def all(self, text: str) -> list[str]:
        """What each rank gives, in their order."""
        given = [text] * self.count
        if self.count > 1:
            dist.all_gather_object(given, text)
        return given


@contextmanager
def process_group(parallel: str, device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Give the rank of this process and its device; a single rank without torchrun, or if ``parallel`` is "none"."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if parallel == "none" and count > 1:
        raise UserError("torchrun started several processes, but --parallel is none; add --parallel class")
    alone = count == 1 and "RANK" not in os.environ and not dist.is_initialized()
    if parallel == "none" or alone:
        yield Ranks(), device
        return
    if dist.is_initialized():  # by the caller, who will also end it
        dist.barrier()  # every rank has looked at the run folder before the first one owns it,
        yield Ranks(dist.get_rank(), dist.get_world_size()), device
        dist.barrier()  # and the first one has let go of it before another goes on
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()


class _Features(nn.Module):
    """The classifier without its head, for DDP: its parameters, and ``forward`` from images to features."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.backbone, self.norm = classifier.backbone, classifier.norm
        self._classifier = [classifier]  # in a list, which hides the head's parameters from DDP

    def forward(self, images: Tensor) -> Tensor:
        return self._classifier[0].features(images)


def wrap_distributed(classifier: Classifier, ranks: Ranks) -> nn.Module:
    """Spread the head's classes over the ranks; return the module for features, whose gradients DDP averages."""
    from ltloss.distributed import class_mesh, parallelize
    from ltloss.losses.prototype_head import PrototypeHead

    features = _Features(classifier)
    if ranks.count == 1:
        return features
    head = classifier.loss
    if not isinstance(head, PrototypeHead):
        raise UserError("--parallel class needs one of the cosine losses; softmax has no prototypes to spread")
    if head.sub_centers > 1 and getattr(head, "min_angle_weight", False):
        raise UserError(
            "--parallel class has no search for the minimum angle between classes with several sub-centres; add "
            "--loss-option min_angle_weight=0, or leave sub_centers out"
        )
    parallelize(head, class_mesh(), averaged_backbone=True)
    if not any(parameter.requires_grad for parameter in features.parameters()):
        return features
    device = next(features.parameters()).device
    return nn.parallel.DistributedDataParallel(features, device_ids=[device] if device.type == "cuda" else None)


def gather_full(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, sharded ones gathered whole; all ranks must call this."""
    from ltloss.distributed.layout import gathered

    return {name: gathered(tensor) if hasattr(tensor, "device_mesh") else tensor for name, tensor in tensors.items()}


def copy_to_shard(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    from ltloss.distributed.layout import Layout, local

    if hasattr(target, "device_mesh"):
        value = value[slice(*Layout.of(target).span())]
    with torch.no_grad():
        local(target).copy_(value)


def common_checkpoint(out: Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint of ``out``, which each rank reads; UserError unless all ranks find the same."""
    ranks.wait()  # until the first one owns the folder
    checkpoint = latest_checkpoint(out)
    found = ranks.all("no checkpoint" if checkpoint is None else checkpoint.name)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise UserError(
                f"--out {out} must be one folder for all ranks: rank 0 found {found[0]}, rank {rank} {other}; "
                "choose a folder in a common file system"
            )
    return checkpoint
