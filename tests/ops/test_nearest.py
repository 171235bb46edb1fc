"""The nearest prototype: values, ties, gradients, each pair once, and no C×C matrix."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.memory import LargestTensor
from helpers.refusals import refused, warned

import ltloss
from ltloss import reference
from ltloss.chunked import logsumexp
from ltloss.functional import min_angle_regularizer, nearest_prototype
from ltloss.ops import prototype_search
from ltloss.testing import copied_prototypes, lowest_nearest, problem, relative_error, signs, watching

EXACT = 1e-13  # float64 cosines, sums of some ten products


def random_prototypes(c: int, d: int = 6, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return problem(1, c, d).prototypes.to(dtype)


@pytest.mark.parametrize("c", [1, 2, 3, 4, 5, 8, 9, 13])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_dense_across_tile_edges(c: int, dtype: torch.dtype, tiny_blocks: object) -> None:
    prototypes = random_prototypes(c, dtype=dtype)
    ours, exact = nearest_prototype(prototypes), reference.nearest_prototype(prototypes.double())
    assert torch.equal(ours.index, exact.index)
    tolerance = EXACT if dtype == torch.float64 else 1e-6  # float32 sums of six products below 1
    assert relative_error(ours.cosine, exact.cosine) <= tolerance
    assert ours.cosine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_equals_dense_with_the_real_blocks() -> None:
    prototypes = random_prototypes(2100, 8)
    ours, exact = nearest_prototype(prototypes), reference.nearest_prototype(prototypes)
    assert torch.equal(ours.index, exact.index)
    assert relative_error(ours.cosine, exact.cosine) <= EXACT


@pytest.mark.parametrize("rows", [[0], [8, 0, 4, 4, 4, 3], [5, 5], list(range(9)), list(range(8, -1, -1))])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_subsets_of_rows_with_duplicates(rows: list[int], dtype: torch.dtype, tiny_blocks: object) -> None:
    prototypes = random_prototypes(9)
    chosen = torch.tensor(rows, dtype=dtype)
    ours, every = nearest_prototype(prototypes, chosen), nearest_prototype(prototypes)
    assert ours.index.tolist() == every.index[rows].tolist()
    assert relative_error(ours.cosine, every.cosine[rows]) <= EXACT


@pytest.mark.parametrize("c", [2, 3, 4, 7, 12, 13, 14, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lowest_of_many_ties(c: int, dtype: torch.dtype, tiny_blocks: object) -> None:
    prototypes = signs(c)
    index, cosine = lowest_nearest(prototypes)
    every = nearest_prototype(prototypes.to(dtype))
    assert (every.index.tolist(), every.cosine.tolist()) == (index, cosine)
    some = nearest_prototype(prototypes.to(dtype), torch.arange(c))
    assert (some.index.tolist(), some.cosine.tolist()) == (index, cosine)


@pytest.mark.parametrize("c", [1025, 1300])
def test_lowest_of_many_ties_with_the_real_blocks(c: int) -> None:
    prototypes = signs(c)
    index, cosine = lowest_nearest(prototypes)
    every = nearest_prototype(prototypes)
    assert (every.index.tolist(), every.cosine.tolist()) == (index, cosine)
    rows = torch.tensor([c - 1, 0, 1024, 511])
    assert nearest_prototype(prototypes, rows).index.tolist() == [index[row] for row in rows]


@pytest.mark.parametrize(
    "positions", [(0, 1), (0, 3), (2, 3), (3, 12), (0, 12), (11, 12), (0, 5, 12), (1, 2, 3, 4, 12)]
)
@pytest.mark.parametrize("rows", [False, True])
def test_exact_duplicates_lowest_index_wins(positions: tuple[int, ...], rows: bool, tiny_blocks: object) -> None:
    """13 classes in tiles of at most 3 rows: duplicates inside a tile, in different tiles, and in the last one."""
    prototypes = signs(13)
    prototypes[list(positions)] = prototypes[positions[0]].clone()
    index = nearest_prototype(prototypes, torch.arange(13) if rows else None).index
    for position in positions:
        assert int(index[position]) == min(other for other in positions if other != position)


def test_lowest_copy_of_a_random_prototype() -> None:
    """A product rounds equal columns differently at its edges: without ``EqualRows``, about one in a hundred fails."""
    for seed in range(600):
        prototypes, query, low, high = copied_prototypes(seed)
        prototypes = torch.cat([prototypes, query[None]])
        last = prototypes.shape[0] - 1
        assert nearest_prototype(prototypes, torch.tensor([last])).index.tolist() == [low]
        assert nearest_prototype(prototypes, torch.tensor([low, high])).index.tolist() == [high, low]
        if seed < 30:
            assert nearest_prototype(prototypes).index[[last, low, high]].tolist() == [low, high, low]


def test_ties_between_different_vectors() -> None:
    """Right angles everywhere, in exact arithmetic: every class has all others as nearest."""
    for c in (2, 3, 8, 70):
        index = nearest_prototype(torch.eye(c)).index
        assert index.tolist() == [1] + [0] * (c - 1)


def test_lengths_do_not_matter(tiny_blocks: object) -> None:
    prototypes = random_prototypes(9)
    scaled = prototypes * torch.logspace(-3, 3, 9, dtype=torch.float64)[:, None]
    assert torch.equal(nearest_prototype(prototypes).index, nearest_prototype(scaled).index)


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("rows", [None, [8, 0, 4, 4, 3]])
def test_gradient_equals_the_dense_one(counts: bool, rows: list[int] | None, tiny_blocks: object) -> None:
    given = random_prototypes(9)
    given[4:7] = given[4] + 0.05 * given[4:7]  # neighbours that are shared
    class_counts = torch.arange(1, 10) if counts else None
    chosen = None if rows is None else torch.tensor(rows)
    results = []
    for function in (min_angle_regularizer, reference.min_angle_regularizer):
        leaf = given.clone().requires_grad_()
        value = function(leaf, class_counts, classes=chosen)
        results.append((value, torch.autograd.grad(value, leaf)[0]))
    for ours, exact in zip(*results, strict=True):
        assert relative_error(ours, exact) <= 1e-12  # 1/sin of angles near 0.05 amplifies twentyfold


def test_any_upstream_gradient(tiny_blocks: object) -> None:
    for upstream in (torch.randn(9), -torch.ones(1).expand(9), torch.zeros(9), torch.randn(18)[::2]):
        results = []
        for function in (nearest_prototype, reference.nearest_prototype):
            leaf = random_prototypes(9).requires_grad_()
            results.append(torch.autograd.grad(function(leaf).cosine, leaf, upstream.double())[0])
        assert relative_error(*results) <= 1e-12


def test_gradient_where_prototypes_coincide() -> None:
    """The angle is 0 there and its slope clamped; what reaches a vector is perpendicular to it, hence 0."""
    leaf = torch.eye(4, 6, dtype=torch.float64)
    leaf[3] = leaf[0]
    leaf.requires_grad_()
    nearest_prototype(leaf).cosine[[0, 3]].sum().backward()
    assert not leaf.grad[[0, 3]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradient_has_the_dtype_of_the_prototypes(dtype: torch.dtype) -> None:
    leaf = random_prototypes(9, dtype=dtype).requires_grad_()
    min_angle_regularizer(leaf).backward()
    assert (leaf.grad.dtype, leaf.grad.shape) == (dtype, leaf.shape)


@pytest.mark.parametrize("row", [0, 5, 12])
def test_not_a_number_is_seen_by_all(row: int, tiny_blocks: object) -> None:
    """As a NaN cosine, on either side of the pair, and with the index of the culprit."""
    prototypes = random_prototypes(13)
    prototypes[row, 1] = math.nan
    cosine, index = nearest_prototype(prototypes)
    assert bool(cosine.isnan().all())
    others = [i for i in range(13) if i != row]
    assert index[others].tolist() == [row] * 12


@pytest.mark.parametrize("rows", [None, [2, 0]])
@pytest.mark.parametrize("allow_tf32", [False, True])
def test_float32_products_are_asked_for_and_only_then(
    allow_tf32: bool, rows: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    maxima = torch.Tensor.amax

    def watched(tile: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.add(torch.get_float32_matmul_precision())
        return maxima(tile, *args)

    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.Tensor, "amax", watched)
    torch.set_float32_matmul_precision("medium")
    try:
        chosen = None if rows is None else torch.tensor(rows)
        nearest_prototype(random_prototypes(5, dtype=torch.float32), chosen, allow_tf32=allow_tf32)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {"medium" if allow_tf32 else "highest"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the searches of a test are told of TF32."""
    asked: list[bool] = []
    search = prototype_search.nearest_in_one_piece

    def watched(prototypes: torch.Tensor, rows: torch.Tensor | None, allow_tf32: bool) -> Any:
        asked.append(allow_tf32)
        return search(prototypes, rows, allow_tf32)

    monkeypatch.setattr(prototype_search, "nearest_in_one_piece", watched)
    return asked


@pytest.mark.parametrize("allow_tf32", [False, True])
def test_the_module_passes_it_on(allow_tf32: bool, asked: list[bool]) -> None:
    head = ltloss.LongTailLoss.from_counts([5, 3, 1], 4, min_angle_weight=0.1, min_angle_allow_tf32=allow_tf32)
    head(torch.randn(2, 4), torch.tensor([0, 2]))
    assert asked == [allow_tf32]
    assert head.hyper_parameters()["min_angle_allow_tf32"] is allow_tf32


@pytest.mark.parametrize("name", ["allow_tf32", "exact"])
def test_it_is_a_bool(name: str) -> None:
    for function in (nearest_prototype, min_angle_regularizer):
        with refused(name, "bool", "int", "1", error=TypeError):
            function(random_prototypes(3), **{name: 1})


@pytest.mark.parametrize("exact", [False, True])
def test_the_name_of_version_0_1_has_the_opposite_meaning(exact: bool, asked: list[bool]) -> None:
    for function in (nearest_prototype, min_angle_regularizer):
        with warned(f"exact={exact}", f"allow_tf32={not exact}"):
            function(random_prototypes(3), exact=exact)
    with warned(f"min_angle_exact={exact}", f"min_angle_allow_tf32={not exact}"):
        head = ltloss.LongTailLoss.from_counts([5, 3, 1], 4, min_angle_exact=exact)
    assert head.min_angle_allow_tf32 is not exact
    assert asked == [not exact] * 2


class TestEachPairOnce:
    def area(self, prototypes: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
        area = 0
        multiply = torch.mm

        def counted(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
            nonlocal area
            area += a.shape[0] * b.shape[1]
            return multiply(a, b, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "mm", counted)
            nearest_prototype(prototypes)
        return area

    def test_tiny_tiles(self, tiny_blocks: object, monkeypatch: pytest.MonkeyPatch) -> None:
        for c in (1, 3, 7, 20):
            area = self.area(random_prototypes(c), monkeypatch)
            assert c * (c + 1) / 2 <= area <= c * c / 2 + 1.5 * c + 4.5  # half, and half a tile on the diagonal

    def test_real_tiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        c = 4100
        size = min(logsumexp.block_sizes(c, c, 4, torch.device("cpu")))
        assert self.area(random_prototypes(c, 4, torch.float32), monkeypatch) <= c * c / 2 + size * c / 2


@pytest.mark.parametrize("rows", [None, 600])
def test_no_square_matrix(rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards and backwards, nothing larger than a tile or the prototypes is ever allocated."""
    c, d = 3000, 4
    leaf = random_prototypes(c, d, torch.float32).requires_grad_()
    with watching(LargestTensor()) as seen:
        chosen = None if rows is None else torch.arange(rows)
        min_angle_regularizer(leaf, torch.ones(c), classes=chosen).backward()
    assert seen.operators > 20  # it looked inside
    assert seen.largest <= 1 << 20  # the budget of a tile: 1M elements, against C² = 9M and R·C = 1.8M
