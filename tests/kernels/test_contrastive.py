"""Contrastive losses on the kernels: a batch or a queue in the place of the prototypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.kernel_problems import DEVICE

from ltloss import contrastive, reference
from ltloss.testing import relative_error

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", ["info_nce", "supervised_contrastive"])
def test_equal_the_dense_twin(name: str, learned: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(19, 12, generator=generator) for _ in range(2))
    y, queue_y = (torch.randint(5, (19,), generator=generator).to(DEVICE) for _ in range(2))
    found = []
    for module, dtype in ((contrastive, torch.float32), (reference, torch.float64)):
        leaves = [one.to(DEVICE, dtype).requires_grad_() for one in (a, b, *[torch.tensor(7.0)] * learned)]
        given: Any = (leaves[0], y, leaves[1], queue_y) if name == "supervised_contrastive" else leaves[:2]
        loss = getattr(module, name)(*given, scale=leaves[2] if learned else 7.0)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 5e-6
