"""The best classes of each sample on the kernels, against the float64 law."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.interpreter import products_by_value
from helpers.kernel_problems import DEVICE, kernel_problem
from helpers.memory import LargestTensor
from ltloss_kernels.config.chunking import search_rows

import ltloss
from ltloss import reference
from ltloss.functional import top_k
from ltloss.ops.prototype_search import OPERATORS
from ltloss.testing import copied_prototypes, relative_error, signs, watching

pytestmark = pytest.mark.slow

F16, BF16, F32, F8 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn
COSINE = 5e-7  # a cosine is a float32 sum of some ten to a hundred products


def assert_best(features: torch.Tensor, prototypes: torch.Tensor, k: int) -> None:
    ours, exact = top_k(features, prototypes, k), reference.top_k(features.double().cpu(), prototypes.double().cpu(), k)
    assert ours.index.cpu().tolist() == exact.index.tolist()
    assert ours.cosine.dtype == F32
    assert relative_error(ours.cosine.cpu(), exact.cosine) <= COSINE


@pytest.mark.parametrize("k", [1, 2, 5, 16, 17, 70])
@pytest.mark.parametrize(
    "dtypes",
    [(F32, F32), (F16, F16), (F16, F32), (BF16, F32), (F32, BF16), (BF16, BF16), (F32, F8), (F16, F8), (BF16, F8)],
)
def test_equals_dense(k: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """In mixed dtypes too nothing is rounded that was not rounded before."""
    given = kernel_problem(5, dtypes=dtypes)
    assert_best(given.features, given.prototypes, k)


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 2, 5), (17, 16, 16), (2, 33, 2), (1, 20, 130)])
def test_other_shapes(shape: tuple[int, int, int]) -> None:
    given = kernel_problem(*shape)
    for k in {1, min(7, shape[1]), shape[1]}:
        assert_best(given.features, given.prototypes, k)


def test_no_samples() -> None:
    given = kernel_problem(3)
    found = top_k(given.features[:0], given.prototypes, 4)
    assert (found.cosine.shape, found.index.shape, found.index.dtype) == ((0, 4), (0, 4), torch.int64)


def test_any_strides() -> None:
    given = kernel_problem(12, 40, 50)
    assert_best(given.features[::3, 1:41:2], given.prototypes[::2, 5:45:2], 3)
    assert_best(given.features[:, 8:24], given.prototypes[:, 8:24], 3)
    assert_best(given.features[:1].expand(3, -1), given.prototypes, 3)


@pytest.mark.parametrize("k", [1, 3, 7, 16, 40])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_many_ties_in_class_order(k: int, dtype: torch.dtype) -> None:
    prototypes = signs(40)
    queries = torch.cat([prototypes[:3], prototypes[-2:]])
    rows = (queries @ prototypes.t()).tolist()
    expected = [sorted(range(40), key=lambda j, row=row: (-row[j], j))[:k] for row in rows]
    found = top_k(queries.to(DEVICE, dtype), prototypes.to(DEVICE, dtype), k)
    assert found.index.tolist() == expected
    assert bool((found.cosine.diff(dim=1) <= 0).all())


def test_zero_feature_takes_the_first_classes() -> None:
    given = kernel_problem(3)
    found = top_k(torch.zeros_like(given.features), given.prototypes, 20)
    assert found.index.tolist() == [list(range(20))] * 3
    assert not found.cosine.any()


@pytest.mark.parametrize("dtype", [F32, F16] if DEVICE == "cpu" else [F32, F16, BF16])
@products_by_value()
def test_copies_come_in_class_order(dtype: torch.dtype) -> None:
    for seed in range(2 if DEVICE == "cpu" else 100):
        prototypes, query, low, high = copied_prototypes(seed)
        prototypes, query = prototypes.to(DEVICE, dtype), query[None].to(DEVICE, dtype)
        assert top_k(query, prototypes, 1).index.tolist() == [[low]]
        assert top_k(query, prototypes, 3).index[0, :2].tolist() == [low, high]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_a_number(bad: float) -> None:
    """A bad feature has no cosines; a bad class comes first everywhere, as in a sort of NaN."""
    given = kernel_problem(4)
    features, prototypes = given.features.clone(), given.prototypes.clone()
    features[1, 0] = bad
    expected = top_k(given.features, prototypes, 3)
    found = top_k(features, prototypes, 3)
    assert found.cosine.isnan().all(1).tolist() == [False, True, False, False]
    assert torch.equal(found.index[[0, 2, 3]], expected.index[[0, 2, 3]])
    assert bool(((found.index >= 0) & (found.index < 70)).all())
    prototypes[20, 2] = bad
    found = top_k(given.features, prototypes, 3)
    assert found.index[:, 0].tolist() == [20] * 4
    assert found.cosine.isnan().tolist() == [[True, False, False]] * 4


def test_chunks_change_nothing() -> None:
    given = kernel_problem(37)
    whole = top_k(given.features, given.prototypes, 3)
    with ltloss.use_workspace(1 << 14):
        parts = top_k(given.features, given.prototypes, 3)
    assert torch.equal(parts.index, whole.index)
    assert relative_error(parts.cosine, whole.cosine) <= COSINE


@pytest.mark.parametrize(
    ("samples", "classes", "k"), [(8192, 131_072, 5), (8192, 131_072, 128), (100_000, 1_000_000, 1), (3, 50_000_000, 1)]
)
def test_chunks_keep_the_limit(samples: int, classes: int, k: int) -> None:
    tiles = -(-classes // 128)
    candidates = min(k, tiles) * 128
    rows = search_rows(samples, tiles, candidates, 256 << 20)
    assert 1 <= rows <= samples
    assert rows == 1 or rows * 24 * max(tiles, candidates) <= 256 << 20


def test_search_without_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    given = kernel_problem(160, 160, 4)
    with watching(LargestTensor()) as seen, ltloss.use_workspace(1 << 14):
        top_k(given.features, given.prototypes, 1)
    assert seen.operators > 10
    assert seen.largest < 160 * 160 // 2


def test_operator() -> None:
    """Schema, fake tensors, autograd registration, and tracing with dynamic shapes."""
    given = kernel_problem(5, 20, 8)
    arguments: tuple[Any, ...] = (given.features, given.prototypes, 3)
    torch.library.opcheck(OPERATORS["top_k"]["triton"], arguments)


def test_prediction() -> None:
    head = ltloss.ArcFaceLoss(70, 19).to(DEVICE)
    features = kernel_problem(5).features
    exact = reference.top_k(features.double(), head.weight.detach().double(), 5)
    assert torch.equal(head.predict(features, k=5).index, exact.index)
