"""The best classes of each sample: values, ties, NaN, and no N×C matrix. And the same memory law for the loss."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.memory import LargestTensor
from helpers.refusals import refused

from ltloss import reference
from ltloss.functional import cosine_logsumexp, margin_cross_entropy, top_k
from ltloss.ops.prototype_search import OPERATORS
from ltloss.testing import FAMILY, copied_prototypes, problem, relative_error, watching


@pytest.mark.parametrize("k", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_dense_across_tile_edges(k: int, dtype: torch.dtype, tiny_blocks: object) -> None:
    features, prototypes, _ = problem(7, 9, 6)
    features, prototypes = features.to(dtype), prototypes.to(dtype)
    ours, exact = top_k(features, prototypes, k), reference.top_k(features.double(), prototypes.double(), k)
    assert torch.equal(ours.index, exact.index)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6  # sums of six products below 1
    assert relative_error(ours.cosine, exact.cosine) <= tolerance


@pytest.mark.parametrize("shape", [(1, 1, 3), (0, 4, 3), (5, 2, 1), (1030, 1100, 4)])
def test_other_shapes(shape: tuple[int, int, int]) -> None:
    features, prototypes, _ = problem(*shape)
    for k in {1, min(7, shape[1]), shape[1]} if shape[0] < 100 else {1, 7}:
        ours, exact = top_k(features, prototypes, k), reference.top_k(features, prototypes, k)
        assert torch.equal(ours.index, exact.index)
        assert relative_error(ours.cosine, exact.cosine) <= 1e-13


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_mixed_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    features, prototypes, _ = problem(7, 9, 6)
    got = top_k(features.to(dtypes[0]), prototypes.to(dtypes[1]), 3)
    assert got.cosine.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    assert torch.equal(
        got.index, reference.top_k(features.to(dtypes[0]).double(), prototypes.to(dtypes[1]).double(), 3).index
    )


@pytest.mark.parametrize("k", range(1, 14))
def test_equal_cosines_in_class_order(k: int, tiny_blocks: object) -> None:
    """Axis-parallel vectors have exact cosines: 1 for the classes 2, 5, 8, 11, 0 for the others, in tiles of four."""
    prototypes = torch.zeros(13, 3)
    prototypes[:, 0] = 1.0
    prototypes[2::3] = torch.tensor([0.0, 0.0, 2.0])
    query = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    best = [2, 5, 8, 11]
    rest = [c for c in range(13) if c not in best]
    got = top_k(query, prototypes, k)
    assert got.index.tolist() == [(best + rest)[:k], (rest + best)[:k]]


@pytest.mark.parametrize("c", [13, 1300])
@pytest.mark.parametrize("k", [1, 3, 7, 13])
def test_many_ties_in_class_order(c: int, k: int, request: pytest.FixtureRequest) -> None:
    """Entries ±1 in 16 dimensions: every cosine is exact, and most are equal to some other."""
    if c == 13:
        request.getfixturevalue("tiny_blocks")
    prototypes = torch.randint(2, (c, 16)) * 2 - 1
    queries = torch.cat([prototypes[:5], prototypes[-2:]])
    rows = (queries @ prototypes.t()).tolist()
    expected = [sorted(range(c), key=lambda j, row=row: (-row[j], j))[:k] for row in rows]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert top_k(queries.to(dtype), prototypes.to(dtype), k).index.tolist() == expected
        assert top_k(queries[:1].to(dtype), prototypes.to(dtype), k).index.tolist() == expected[:1]


def test_zero_feature_takes_the_first_classes(tiny_blocks: object) -> None:
    got = top_k(torch.zeros(1, 5), torch.randn(9, 5), 6)
    assert got.index.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert not got.cosine.any()


def test_not_a_number(tiny_blocks: object) -> None:
    features, prototypes, _ = problem(4, 9, 5, dtype=torch.float32)
    expected = top_k(features, prototypes, 3)
    features[1, 0] = math.nan
    got = top_k(features, prototypes, 3)
    assert got.cosine.isnan().all(1).tolist() == [False, True, False, False]
    assert torch.equal(got.index[[0, 2, 3]], expected.index[[0, 2, 3]])
    assert bool(((got.index >= 0) & (got.index < 9)).all())


def test_cosines_stay_in_range_and_nothing_is_differentiable() -> None:
    vectors = torch.randn(50, 3, requires_grad=True)
    got = top_k(vectors, vectors, 1)
    assert got.index[:, 0].tolist() == list(range(50))
    assert float(got.cosine.max()) <= 1.0
    assert not got.cosine.requires_grad


def test_the_operator_refuses_a_gradient() -> None:
    features, prototypes, _ = problem().leaves()
    cosine, _ = OPERATORS["top_k"]["torch"](features, prototypes, 1)
    with refused("top_k_torch", error=RuntimeError):
        cosine.sum().backward()


# N×C = 4.8M elements against a budget of 1M for a tile.
N, C, D = 1200, 4000, 8


def test_search_without_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(N, C, D, dtype=torch.float32)
    with watching(LargestTensor()) as seen:
        top_k(given.features, given.prototypes, 5)
    assert seen.operators > 20
    assert seen.largest <= 1 << 20


@pytest.mark.parametrize("name", ["everything", "feature_length_smoothed"])
def test_loss_without_the_matrix_forwards_and_backwards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(N, C, D, dtype=torch.float32).leaves()
    with watching(LargestTensor()) as seen:
        margin_cross_entropy(*given, **FAMILY[name](C)).backward()
    assert seen.operators > 50
    assert seen.largest <= 1 << 20


def test_two_numbers_without_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    features, prototypes, _ = problem(N, C, D, dtype=torch.float32).leaves()
    with watching(LargestTensor()) as seen:
        r, t = cosine_logsumexp(features, prototypes, torch.arange(N), scale=9.0)
        (r - t).sum().backward()
    assert seen.largest <= 1 << 20


def test_the_watcher_sees_a_dense_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The law above can fail."""
    given = problem(N, C, D, dtype=torch.float32).leaves()
    with watching(LargestTensor()) as seen:
        reference.margin_cross_entropy(*given).backward()
    assert seen.largest >= N * C


def test_copies_come_in_class_order() -> None:
    """A product rounds equal columns differently at its edges: without ``EqualRows``, about one in a hundred fails."""
    for seed in range(300):
        prototypes, query, low, high = copied_prototypes(seed)
        assert top_k(query[None], prototypes, 1).index.tolist() == [[low]]
        assert top_k(query[None], prototypes, 2).index.tolist() == [[low, high]]
        assert top_k(query.expand(5, -1), prototypes, 3).index[:, :2].tolist() == [[low, high]] * 5


def test_copies_take_no_k_by_k_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty equal prototypes among the best thousand: nothing of N·k² = 16 million numbers."""
    prototypes = torch.randn(3000, 8)
    prototypes[:50] = prototypes[0].clone()
    queries = torch.randn(16, 8)
    with watching(LargestTensor()) as seen:
        index = top_k(queries, prototypes, 1000).index
    assert seen.largest <= 1 << 20
    for row in index.tolist():
        copies = [j for j in row if j < 50]
        assert copies == list(range(len(copies)))
