"""Few samples: prototypes are read once in each direction, and their gradient is projected where it is made."""

from __future__ import annotations

import pytest
import torch
from helpers.kernel_problems import (
    DEVICE,
    assert_close,
    exact_outcome,
    kernel_problem,
    options_on_device,
)
from ltloss_kernels.config import choices, chunking, tile_table
from ltloss_kernels.config.precision import float32_products

import ltloss
from ltloss.testing import FAMILY, outcome

INTERPRETED = DEVICE == "cpu"


# In TF32 the forward's tiles find the lengths of prototypes (its products are exact in the interpreter), in float32 the
# product for the prototypes ends in their projection; float16 does the first, bfloat16 on a GPU both.
@pytest.mark.skipif(not INTERPRETED, reason="TF32 rounds on a GPU")
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("samples", [1, 37])
def test_against_float64(precision: str, name: str, samples: int) -> None:
    given, options = kernel_problem(samples, d=20, ignored=samples > 1), FAMILY[name](70)
    with float32_products(precision):
        assert_close(outcome(given, **options_on_device(options)), exact_outcome(given, **options))


@pytest.mark.parametrize("samples", [5, 37])
def test_several_slabs(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds 16 classes of 96."""
    monkeypatch.setattr(chunking, "_LEAST_CLASSES", 16)
    monkeypatch.setattr(tile_table, "cache_bytes", lambda device: 16 * 4 * (20 + samples))
    given, options = kernel_problem(samples, c=96, d=20), FAMILY["everything"](96)
    with choices.trying("slabs of the cache"):
        assert_close(outcome(given, **options_on_device(options)), exact_outcome(given, **options))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_one_gradient_alone_is_the_same(needs: tuple[bool, bool]) -> None:
    given = kernel_problem(d=20)
    _, *both = outcome(given, reduction="sum")
    leaves = [leaf.detach().requires_grad_(need) for leaf, need in zip(given[:2], needs, strict=True)]
    ltloss.functional.margin_cross_entropy(*leaves, given.labels, reduction="sum").backward()
    for leaf, gradient in zip(leaves, both, strict=True):
        assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, gradient)


@pytest.mark.skipif(not INTERPRETED, reason="float32 that is TF32 on a GPU")
class TestLengthsInTheTiles:
    """Where a sum of squares leaves the range of float32, the tile is read again: as exact as a pass of its own."""

    @staticmethod
    def _logsumexp(prototypes: torch.Tensor, precision: str) -> torch.Tensor:
        features = torch.randn(7, prototypes.shape[1], generator=torch.Generator().manual_seed(1))
        with float32_products(precision):
            return ltloss.functional.margin_cross_entropy(
                features, prototypes, torch.zeros(7, dtype=torch.int64), scale=8.0, reduction="none"
            )

    @pytest.mark.parametrize("size", [1e-30, 1e-21, 1e-12, 1e18, 1e22, 1e35])
    def test_any_length(self, size: float) -> None:
        usual = torch.randn(70, 20, generator=torch.Generator().manual_seed(0))
        scaled = usual.clone()
        scaled[::7] *= 2.0 ** round(torch.tensor(size).log2().item())
        # A power of two changes no angle.
        torch.testing.assert_close(
            self._logsumexp(scaled, "high"), self._logsumexp(usual, "high"), rtol=1e-6, atol=1e-6
        )

    @pytest.mark.parametrize("value", [0.0, 1e-40, float("nan"), float("inf")])
    def test_what_has_no_length(self, value: float) -> None:
        """Zero rows have cosine 0 with everything; what is not finite shows, as it does with a pass of its own."""
        prototypes = torch.randn(70, 20, generator=torch.Generator().manual_seed(0))
        prototypes[33] = value
        torch.testing.assert_close(
            self._logsumexp(prototypes, "high"), self._logsumexp(prototypes, "highest"), equal_nan=True
        )


def test_a_slab_stays_in_the_cache() -> None:
    """Of 50 MiB half: (256, 1M, 512) in bfloat16 takes 1536 bytes a class; many samples fill the workspace instead."""
    sizes = {"per_sample": 1024, "per_class": 0, "itemsize": 2, "tile_classes": 128, "limit": 256 << 20}
    few = chunking.backward_plan(256, 10**6, **sizes, reread=1024, cache=25 << 20)
    assert few.rows == 256
    assert 15_000 < few.classes <= (25 << 20) // 1536
    many = chunking.backward_plan(8192, 10**6, **sizes, reread=1024, cache=25 << 20)
    assert many == chunking.backward_plan(8192, 10**6, **sizes)


def test_one_program_takes_what_it_can() -> None:
    assert [chunking.ceil_div(n, tile_table.sample_rows(n)) for n in (1, 16, 17, 32, 33, 64)] == [1, 1, 1, 1, 3, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("samples", "width"), [(1, 8), (512, 64)])
def test_the_sums_of_the_tiles_are_in_the_workspace(samples: int, width: int, dtype: torch.dtype) -> None:
    from ltloss_kernels.backward_pass import BackwardPass

    classes, limit = 200_000, 1 << 20
    features, prototypes = torch.ones(samples, width, dtype=dtype), torch.empty(classes, width, dtype=dtype)
    labels = torch.zeros(samples, dtype=torch.int64)
    run = BackwardPass(features, prototypes, 1, labels, None, 30.0, True, True, -100, None, None)
    run.take(torch.ones(()), torch.zeros(4, samples), torch.ones(classes), None, torch.ones(()), False)
    run.allocate(True, True, False, limit)
    assert run.along is not None
    batch = samples * (width * dtype.itemsize + 4 * 5)
    assert run.along.nbytes + samples * run.plan.classes * dtype.itemsize <= max(limit, 1024 * 4 * samples) + batch


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_target_that_is_not_finite_shows(value: float) -> None:
    features, prototypes = torch.randn(3, 8), torch.randn(5, 8)
    prototypes[2, 1] = value
    loss = ltloss.functional.margin_cross_entropy(features, prototypes, torch.tensor([2, 2, 0]), reduction="none")
    assert loss.isnan().all()
