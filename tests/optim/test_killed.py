"""A process that dies in the middle of an update, and goes on from its last checkpoint."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.killed import exit_code, needs_sigkill

import ltloss
from ltloss._files import write_file
from ltloss.distributed import load_checkpoint, save_checkpoint
from ltloss.optim import PrototypeSGD
from ltloss.testing import problem

pytestmark = [pytest.mark.slow, needs_sigkill]

STEPS, EVERY = 7, 2
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "kahan": (torch.bfloat16, {"rounding": "kahan", "state_dtype": torch.bfloat16}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic", "seed": 3}),
}


class Run:
    """A training of 2,500 classes by 1,024 samples a step: three slabs a backward."""

    def __init__(self, folder: Path, kind: str) -> None:
        torch.manual_seed(0)
        dtype, options = KINDS[kind]
        self.backbone, self.head = torch.nn.Linear(16, 16), ltloss.ArcFaceLoss(2500, 16, dtype=dtype)
        self.modules = {"backbone": self.backbone, "head": self.head}
        self.optimizers: dict[str, Any] = {
            "backbone": torch.optim.SGD(self.backbone.parameters(), lr=0.1, momentum=0.9),
            "head": PrototypeSGD(self.head, lr=0.1, momentum=0.9, weight_decay=0.01, **options),
        }
        self.folder, self.losses = folder, list[float]()

    def train(self) -> None:
        while len(self.losses) < STEPS:
            inputs, _, labels = problem(1024, 2500, 16, seed=len(self.losses), dtype=torch.float32)
            for optimizer in self.optimizers.values():
                optimizer.zero_grad()
            loss = self.head(self.backbone(inputs), labels)
            loss.backward()
            for optimizer in self.optimizers.values():
                optimizer.step()
            self.losses.append(loss.item())
            if len(self.losses) % EVERY == 0 or len(self.losses) == STEPS:
                self.save()

    def save(self) -> None:
        """One file, replaced whole."""
        content = io.BytesIO()
        states = [part.state_dict() for part in (*self.modules.values(), *self.optimizers.values())]
        torch.save([self.losses, *states], content)
        write_file(self.folder / "checkpoint.pt", content.getvalue())

    def restore(self) -> None:
        if (self.folder / "checkpoint.pt").exists():
            self.losses, *states = torch.load(self.folder / "checkpoint.pt")
            for part, state in zip((*self.modules.values(), *self.optimizers.values()), states, strict=True):
                part.load_state_dict(state)

    def bits(self) -> dict[str, torch.Tensor]:
        kept = self.optimizers["head"].state[self.head.weight]
        return {**self.backbone.state_dict(), **self.head.state_dict(prefix="head."), **kept}


class DistributedRun(Run):
    """The same with the checkpoints of ``ltloss.distributed``: one folder each."""

    def save(self) -> None:
        save_checkpoint(
            self.folder / f"step-{len(self.losses)}", self.modules, self.optimizers, {"losses": self.losses}
        )

    def restore(self) -> None:
        found = sorted(self.folder.glob("step-?"))
        if found:
            self.losses = load_checkpoint(found[-1], self.modules, self.optimizers)["losses"]


def _train(form: type[Run], folder: Path, kind: str) -> None:
    run = form(folder, kind)
    run.restore()
    run.train()


def _restored(form: type[Run], folder: Path, kind: str) -> Run:
    run = form(folder, kind)
    run.restore()
    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [Run, DistributedRun])
def test_killed_between_two_slabs_it_continues_bit_for_bit(form: type[Run], kind: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert exit_code(_train, form, whole, kind) == 0
    for backward, steps in ((4, 2), (3, 4), (1, 4)):  # of each process, and what the last checkpoint holds then
        assert exit_code(_train, form, killed, kind, killed_in=backward) == -9
        assert len(_restored(form, killed, kind).losses) == steps
    assert exit_code(_train, form, killed, kind) == 0
    expected, found = (_restored(form, folder, kind) for folder in (whole, killed))
    assert len(expected.losses) == STEPS
    assert found.losses == expected.losses
    assert {"head.weight", "momentum_buffer", "step", "weight"} <= expected.bits().keys()
    assert ("compensation" in expected.bits()) == (kind == "kahan")
    for name, tensor in expected.bits().items():
        assert torch.equal(found.bits()[name], tensor), name
