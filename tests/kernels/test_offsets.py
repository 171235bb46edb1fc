"""Rows more than 2^31 elements apart, without the memory: only the pages that are touched exist."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.kernel_problems import assert_close, exact_outcome, kernel_problem

from ltloss.functional import margin_cross_entropy, nearest_prototype, top_k
from ltloss.testing import Problem, outcome

pytestmark = pytest.mark.slow

FAR = (1 << 30) + 64  # three rows this far apart pass 2^31; a multiple of 16 bytes in every dtype


def _far_apart(rows: torch.Tensor) -> torch.Tensor:
    """The same values with row starts FAR elements apart, on pages that are only reserved (hence not torch.empty)."""
    count, width = rows.shape
    storage = torch.from_numpy(np.empty((count - 1) * FAR + width, dtype=np.float16))
    spread = storage.as_strided((count, width), (FAR, 1))
    spread.copy_(rows)
    return spread


@pytest.mark.skipif(torch.cuda.is_available(), reason="reserves address space of the host")
@pytest.mark.parametrize("which", ["features", "prototypes"])
@pytest.mark.parametrize("width", [16, 19])  # read in place, and copied
def test_rows_beyond_2_to_the_31(which: str, width: int) -> None:
    given = kernel_problem(4, 4, width, dtypes=(torch.float16, torch.float16), ignored=False)
    given = given._replace(labels=torch.tensor([3, 0, 3, 2]))
    far: Problem = given._replace(**{which: _far_apart(getattr(given, which))})
    leaves = [far.features.requires_grad_(), far.prototypes.requires_grad_()]
    loss = margin_cross_entropy(*leaves, far.labels, angular_margin=0.2)
    ours = (loss.detach(), *torch.autograd.grad(loss, leaves))
    expected = outcome(given, angular_margin=0.2)
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))
    assert_close(expected, exact_outcome(given, angular_margin=0.2), 2.0**-9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="reserves address space of the host")
@pytest.mark.parametrize("width", [16, 19])
def test_searches_among_rows_beyond_2_to_the_31(width: int) -> None:
    given = kernel_problem(4, 4, width, dtypes=(torch.float16, torch.float16), ignored=False)
    far = _far_apart(given.prototypes).requires_grad_()
    near = given.prototypes.clone().requires_grad_()
    results = []
    for prototypes in (far, near):
        for rows in (None, torch.tensor([3, 1, 3])):
            found = nearest_prototype(prototypes, rows)
            upstream = torch.linspace(-1, 1, found.cosine.numel())
            results.append((*found, torch.autograd.grad(found.cosine, prototypes, upstream)[0]))
        results.append(tuple(top_k(given.features, prototypes, 3)))
    for one, other in zip(results[:3], results[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    far_features = top_k(_far_apart(given.features), given.prototypes, 3)
    assert all(torch.equal(a, b) for a, b in zip(far_features, results[-1], strict=True))
