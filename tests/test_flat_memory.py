"""A training holds as much after 10,000 steps as before: no tensor, no file and no memory is kept by a step.

`make test` takes 300 steps in one process; `pytest --hypothesis-profile nightly` takes 10,000, and on two ranks too.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import world
from helpers.memory import Held
from helpers.profiles import nightly
from torch import Tensor, nn

import ltloss
from ltloss.distributed import SampledSGD, class_mesh, parallelize
from ltloss.optim import PrototypeAdamW

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell what is held"),
]

# The first steps make caches, and the heap, as large as they will be.
STEPS, FIRST = (10_000, 1_000) if nightly() else (300, 200)
CLASSES, DIM, SAMPLES = 24, 8, 4
MOST = 2 << 20  # bytes that the heap may move by: 210 a step of 10,000

_Parts = tuple[Any, torch.optim.Optimizer]


def _plain() -> _Parts:
    head = ltloss.ArcFaceLoss(CLASSES, DIM)
    return head, torch.optim.AdamW(head.parameters())


def _fused() -> _Parts:
    head = ltloss.ArcFaceLoss(CLASSES, DIM)
    return head, PrototypeAdamW(head)


def _sampled() -> _Parts:
    head = parallelize(ltloss.ArcFaceLoss(CLASSES, DIM), class_mesh(), sample_rate=0.5)
    return head, SampledSGD(head, lr=0.1)


def _spread() -> _Parts:
    head = parallelize(ltloss.ArcFaceLoss(CLASSES, DIM), class_mesh())
    return head, torch.optim.AdamW(head.parameters())


def _added(
    rank: int, make: Callable[[], _Parts], first: int, steps: int, keep: Callable[[Tensor], object] = lambda loss: None
) -> Held:
    """What steps number ``first`` to ``first + steps`` add; ``keep`` is given the loss of each."""
    torch.manual_seed(rank)
    head, optimizer = make()
    backbone, inputs = nn.Linear(DIM, DIM), torch.randn(SAMPLES, DIM)
    before = Held.now()
    for step in range(first + steps):
        if step == first:
            before = Held.now()
        optimizer.zero_grad()
        loss = head(backbone(inputs), torch.arange(step, step + SAMPLES) % CLASSES)
        loss.backward()
        optimizer.step()
        if step >= first:
            keep(loss.detach())
        del loss
    return Held.now().since(before)


def _grows(added: Held) -> bool:
    return added.tensors > 0 or added.files > 0 or added.resident > MOST


@pytest.mark.parametrize("make", [_plain, _fused, _sampled])
def test_one_process(make: Callable[[], _Parts]) -> None:
    added = _added(0, make, FIRST, STEPS)
    assert not _grows(added), added


@pytest.mark.skipif(not nightly(), reason="minutes: the nightly profile has it")
@pytest.mark.parametrize("make", [_spread, _sampled])
def test_two_ranks(make: Callable[[], _Parts]) -> None:
    found = world.run(_added, 2, make, FIRST, STEPS, patience=1200.0)  # a rank does not know the profile
    assert not [added for added in found if _grows(added)]


def test_what_is_kept_shows(tmp_path: Path) -> None:
    kept: list[Any] = []

    def keep(loss: Tensor) -> None:
        fresh = mmap.mmap(-1, 4 * MOST // STEPS)  # bytes would take what an earlier test gave back to the heap
        fresh.write(b"x" * len(fresh))
        kept.extend([loss, fresh])
        if len(kept) == 2:
            kept.append((tmp_path / "file").open("w"))

    added = _added(0, _plain, FIRST, STEPS, keep)
    kept[2].close()
    assert added.tensors == STEPS
    assert added.files == 1
    assert added.resident > MOST
    assert _grows(added)
