"""Ways to work that are off by default compute the same."""

from __future__ import annotations

import pytest
import torch
from ltloss_kernels.config import choices, chunking, tile_table
from ltloss_kernels.config.operands import multiply_add_in_parts

import ltloss
from ltloss.testing import FAMILY, assert_same, outcome, problem


@pytest.mark.slow
@pytest.mark.parametrize("name", choices.NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step_is_the_same(name: choices.Choice, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "_LEAST_CLASSES", 64)
    monkeypatch.setattr(tile_table, "multiprocessors", lambda device: 2)
    # Several slabs by the workspace, one, or several by the cache.
    sizes = {"one wave": (900, 1 << 16, 1 << 28), "parts of K": (2100, 1 << 28, 1 << 28)}
    classes, workspace, cache = sizes.get(name, (900, 1 << 28, 1 << 16))
    monkeypatch.setattr(tile_table, "cache_bytes", lambda device: cache)
    given, options = problem(20, classes, 16, dtype=dtype), FAMILY["long_tail"](classes)
    with ltloss.use_workspace(workspace):
        usual = outcome(given, **options)
        with choices.trying(name):
            found = outcome(given, **options)
        assert not choices.tried(name)
    assert_same(found, usual, 1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize(("depth", "parts"), [(7, 1), (96, 3), (100, 3), (5, 5)])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_product_in_parts_is_the_product(depth: int, parts: int, overwrite: bool) -> None:
    left, right, target = torch.randn(6, depth), torch.randn(depth, 4), torch.randn(6, 4)
    expected = left.double() @ right.double() + (0.0 if overwrite else target.double())
    multiply_add_in_parts(target, left, right, parts, overwrite=overwrite)
    torch.testing.assert_close(target.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_slab_is_whole_waves() -> None:
    """On 132 multiprocessors a wave is 66 tiles of 128 classes by two of 256 columns."""
    assert chunking.in_waves(16_384, 512, 132) == 8448
    assert chunking.in_waves(17_000, 512, 132) == 2 * 8448
    assert chunking.in_waves(5000, 512, 132) == 5000, "less than a wave stays as it is"
    assert chunking.in_waves(5000, 256 * 200, 132) == 5000, "a wave that holds no tile of all columns"


def test_small_results_are_cut_into_parts_for_every_multiprocessor() -> None:
    assert chunking.parts_of_product(256, 512, 132_000, 132) == 33
    assert chunking.parts_of_product(256, 512, 16_384, 132) == 16, "parts of 1024 at least"
    assert chunking.parts_of_product(8192, 512, 16_384, 132) == 1
