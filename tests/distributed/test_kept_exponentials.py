"""Ranks keep the exponentials of their own classes."""

from __future__ import annotations

import pytest
import torch
from helpers import world
from helpers.cases import Case, Trace, trace

import ltloss
from ltloss.testing import relative_error

pytestmark = pytest.mark.slow

CASES = [Case(name, 11, ((5, 3),)) for name in ("family everything", "family feature_length", "CosineSpaceLoss")]


def _all(rank: int, keep: bool) -> list[Trace]:
    with ltloss.use_workspace(1 << 20, keep_exponentials=keep):
        return [trace(case, rank) for case in CASES]


def test_two_ranks() -> None:
    plain, found = (world.run(_all, 2, keep) for keep in (False, True))
    for one, other in zip(plain, found, strict=True):
        for usual, kept in zip(one, other, strict=True):
            assert torch.equal(usual.losses[0], kept.losses[0])
            for actual, exact in (
                (kept.weight_grad, usual.weight_grad),
                (kept.feature_grads[0], usual.feature_grads[0]),
            ):
                # Each of the terms that they are sums of is rounded to 2^-8; sums of eleven do not cancel to a quarter.
                assert 0.0 < relative_error(actual, exact) <= 4 * 2.0**-8
