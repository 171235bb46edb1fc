"""A head whose classes are spread over ranks, beside a backbone under DDP or FSDP2; on CPUs (gloo) and GPUs (NCCL).

    torchrun --nproc-per-node 2 examples/class_parallel.py
    torchrun --nproc-per-node 2 examples/class_parallel.py --fsdp --checkpoints runs/example
    python examples/class_parallel.py                                  # one process, the same code

The data is made up: 512 classes, each a random direction with noise around it. The losses are those of the global
batch, so they hardly depend on how many ranks there are. With --checkpoints a run that was stopped goes on, on any
number of ranks.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ltloss import LongTailLoss
from ltloss.distributed import class_mesh, load_checkpoint, parallelize, save_checkpoint

CLASSES, PIXELS, DIM, BATCH, STEPS = 512, 64, 32, 256, 60


def batch(step: int, rank: int, ranks: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of the global batch of a step."""
    centres = torch.randn(CLASSES, PIXELS, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + step)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    images = centres[labels] + 0.5 * torch.randn(BATCH, PIXELS, generator=generator)
    return images[rank::ranks].to(device), labels[rank::ranks].to(device)


def wrapped(backbone: nn.Module, mesh: Any, device: torch.device, fsdp: bool) -> nn.Module:
    """The backbone under DDP or FSDP2, or as it is in one process."""
    if mesh is None:
        return backbone
    if fsdp:
        from torch.distributed.fsdp import fully_shard

        fully_shard(backbone, mesh=mesh)
        return backbone
    return nn.parallel.DistributedDataParallel(backbone, device_ids=[device] if device.type == "cuda" else None)


def train(mesh: Any, device: torch.device, fsdp: bool, checkpoints: Path | None) -> None:
    """Train, with a checkpoint every twenty steps."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if mesh is not None else (0, 1)
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(PIXELS, 128), nn.ReLU(), nn.Linear(128, DIM)).to(device)
    features = wrapped(backbone, mesh, device, fsdp)
    counts = torch.arange(CLASSES, 0, -1)
    # DDP and FSDP divide the gradients of the backbone by the number of ranks: `averaged_backbone` makes up for it.
    loss_fn = parallelize(LongTailLoss.from_counts(counts, DIM, device=device), mesh, averaged_backbone=True)
    # Two optimizers: torch does not update sharded and ordinary parameters in one group.
    optimizers = {
        "backbone": torch.optim.SGD(features.parameters(), lr=0.1, momentum=0.9),
        "head": torch.optim.SGD(loss_fn.parameters(), lr=0.1, momentum=0.9),
    }
    modules = {"backbone": features, "head": loss_fn}
    saved = sorted(checkpoints.glob("step-[0-9][0-9][0-9]")) if checkpoints else []
    start = load_checkpoint(saved[-1], modules, optimizers)["step"] if saved else 0

    for step in range(start, STEPS):
        images, labels = batch(step, rank, ranks, device)
        loss = loss_fn(features(images), labels)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
        if rank == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
        if checkpoints and step % 20 == 19:
            save_checkpoint(checkpoints / f"step-{step + 1:03d}", modules, optimizers, {"step": step + 1})

    images, labels = batch(STEPS, rank, ranks, device)
    correct = (loss_fn.predict(features(images)).index[:, 0] == labels).sum()
    if mesh is not None:
        dist.all_reduce(correct)
    if rank == 0:
        print(f"correct on {BATCH} new samples: {correct.item()}")


def main() -> None:
    """Join the ranks, if torchrun started several, and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 for the backbone instead of DDP")
    parser.add_argument("--checkpoints", type=Path, help="folder to continue from and to write to")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if "RANK" in os.environ:
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo")
    train(class_mesh(), device, options.fsdp, options.checkpoints)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
