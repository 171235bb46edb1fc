"""The nearest prototype on the kernels: values, ties, edges, gradients, memory, against the float64 law."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from helpers.kernel_problems import DEVICE
from helpers.memory import LargestTensor
from ltloss_kernels import prototype_search
from ltloss_kernels.config import tile_table as tiles
from ltloss_kernels.device.search_first_pass import LOWEST_KEY, number_of, order_key, triangle_tile

import ltloss
from ltloss import reference
from ltloss.functional import min_angle_regularizer, nearest_prototype
from ltloss.ops.prototype_search import OPERATORS
from ltloss.testing import copied_prototypes, long_tail_counts, lowest_nearest, problem, relative_error, signs, watching

pytestmark = pytest.mark.slow

F16, BF16, F32, F8 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn
INTERPRETED = DEVICE == "cpu"
COSINE = 5e-7  # a cosine is a float32 sum of some ten to a hundred products


def prototypes(c: int, d: int = 19, dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    return problem(1, c, d, seed=seed).prototypes.to(DEVICE, dtype)


def assert_nearest(given: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    """The same classes as in float64 on the same, already rounded numbers, and their cosines."""
    ours = nearest_prototype(given, rows)
    exact = reference.nearest_prototype(given.double().cpu(), None if rows is None else rows.cpu())
    assert ours.index.cpu().tolist() == exact.index.tolist()
    assert ours.cosine.dtype == F32
    assert relative_error(ours.cosine.cpu(), exact.cosine) <= COSINE


@pytest.mark.parametrize("c", [1, 2, 3, 16, 17, 33, 70])
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F8])
def test_equals_dense_across_tile_edges(c: int, dtype: torch.dtype) -> None:
    assert_nearest(prototypes(c, dtype=dtype))


@pytest.mark.parametrize("d", [2, 16, 40, 130])
def test_any_width(d: int) -> None:
    assert_nearest(prototypes(21, d))


def test_one_column() -> None:
    """Nothing but ±1. Lengths differ, so which of the equal ones is found is up to rounding; none is missed."""
    given = prototypes(21, 1)
    found = nearest_prototype(given)
    assert bool((found.cosine >= 1.0 - 2.0**-23).all())
    assert torch.equal(given[found.index].sign(), given.sign())
    assert not bool((found.index == torch.arange(21, device=DEVICE)).any())


@pytest.mark.parametrize("dtype", [F32, F16, F8])
def test_any_strides(dtype: torch.dtype) -> None:
    wide = prototypes(40, 48, dtype)
    for view in (wide[::2, 3:35:2], wide[:20, 1:17], wide[:, :20].t(), wide[3:4].expand(20, -1)):
        found = nearest_prototype(view)
        if view.stride(0):
            assert_nearest(view)
        else:
            assert (found.index.tolist(), found.cosine.round(decimals=6).tolist()) == ([1] + [0] * 19, [1.0] * 20)


@pytest.mark.parametrize("rows", [[0], [8, 0, 4, 4, 4, 36], [5, 5], [36], list(range(20, -1, -1)), []])
@pytest.mark.parametrize(("width", "dtype"), [(16, F32), (19, F32), (16, F8)])  # read in place, and copied
def test_subsets_of_rows(rows: list[int], width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    given = prototypes(37, width, dtype)
    chosen = torch.tensor(rows, dtype=torch.int64, device=DEVICE)
    assert_nearest(given, chosen)
    monkeypatch.setattr(prototype_search, "MOST_ROWS", 4)
    assert_nearest(given, chosen)


@pytest.mark.parametrize("c", [2, 3, 14, 40])
@pytest.mark.parametrize("dtype", [F32, F16, F8])
def test_lowest_of_many_ties(c: int, dtype: torch.dtype) -> None:
    given = signs(c)
    index, cosine = lowest_nearest(given)
    for rows in (None, torch.arange(c, device=DEVICE)):
        found = nearest_prototype(given.to(DEVICE, dtype), rows)
        assert (found.index.tolist(), found.cosine.tolist()) == (index, cosine)


@pytest.mark.parametrize("positions", [(0, 1), (3, 36), (15, 16), (0, 5, 20), (1, 2, 3, 17, 33)])
@pytest.mark.parametrize("subset", [False, True])
def test_of_duplicates_the_lowest_wins(positions: tuple[int, ...], subset: bool) -> None:
    given = signs(37)
    given[list(positions)] = given[positions[0]].clone()
    index = nearest_prototype(given.to(DEVICE), torch.arange(37, device=DEVICE) if subset else None).index
    for position in positions:
        assert int(index[position]) == min(other for other in positions if other != position)


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_of_random_duplicates_the_lowest_wins(dtype: torch.dtype) -> None:
    for seed in range(100):
        given, query, low, high = copied_prototypes(seed)
        given = torch.cat([given, query[None]]).to(DEVICE, dtype)
        last = given.shape[0] - 1
        for rows in (None, torch.arange(last + 1, device=DEVICE)):
            assert nearest_prototype(given, rows).index[[last, low, high]].tolist() == [low, high, low]


def test_zero_rows_are_at_right_angles_to_all() -> None:
    given = prototypes(35)
    given[[0, 20, 34]] = 0.0
    assert_nearest(given)
    everything = nearest_prototype(torch.zeros(20, 4, device=DEVICE))
    assert (everything.index.tolist(), everything.cosine.tolist()) == ([1] + [0] * 19, [0.0] * 20)


def test_lengths_do_not_matter() -> None:
    given = prototypes(35)
    scaled = given * torch.logspace(-12, 12, 35, device=DEVICE)[:, None]
    assert nearest_prototype(scaled).index.tolist() == nearest_prototype(given).index.tolist()
    assert relative_error(nearest_prototype(scaled).cosine, nearest_prototype(given).cosine) <= COSINE


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 20, 36])
@pytest.mark.parametrize("subset", [False, True])
def test_not_a_number_is_seen_by_all(bad: float, row: int, subset: bool) -> None:
    given = prototypes(37)
    given[row, 1] = bad
    cosine, index = nearest_prototype(given, torch.arange(37, device=DEVICE) if subset else None)
    assert bool(cosine.isnan().all())
    assert index[[i for i in range(37) if i != row]].tolist() == [row] * 36
    assert 0 <= int(index[row]) < 37


@pytest.mark.parametrize("allow_tf32", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_precision_of_the_product(allow_tf32: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 where PyTorch and the caller allow it."""
    asked = []
    choose = tiles.search_tile

    def search_tile(arch: int, dtype: torch.dtype, precision: str) -> tiles.Tile:
        asked.append(precision)
        return choose(arch, dtype, precision)

    monkeypatch.setattr(tiles, "search_tile", search_tile)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        nearest_prototype(prototypes(5, dtype=dtype), allow_tf32=allow_tf32)
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(asked) == {"tf32" if allow_tf32 else "ieee"}


class TestGradient:
    @pytest.mark.parametrize("counts", [False, True])
    @pytest.mark.parametrize("rows", [None, [8, 0, 4, 4, 3, 36]])
    @pytest.mark.parametrize("width", [12, 40])
    def test_equals_the_dense_one(self, counts: bool, rows: list[int] | None, width: int) -> None:
        given = prototypes(37, width)
        given[4:30] = given[4] + 0.5 * given[4:30]  # neighbours that are shared
        class_counts = torch.arange(1, 38, device=DEVICE) if counts else None
        chosen = None if rows is None else torch.tensor(rows, device=DEVICE)
        gradients = []
        for function, wide in ((min_angle_regularizer, F32), (reference.min_angle_regularizer, torch.float64)):
            leaf = given.to(wide).requires_grad_()
            gradients.append(torch.autograd.grad(function(leaf, class_counts, classes=chosen), leaf)[0])
        assert relative_error(*gradients) <= 5e-6  # 1/sin of angles near 0.5

    @pytest.mark.parametrize("dtype", [F32, F16, BF16])
    def test_any_upstream_and_dtype(self, dtype: torch.dtype) -> None:
        given = prototypes(20, dtype=dtype)
        for upstream in (torch.randn(20), -torch.ones(1).expand(20), torch.randn(40)[::2]):
            leaf, wide = given.clone().requires_grad_(), given.double().requires_grad_()
            ours = torch.autograd.grad(nearest_prototype(leaf).cosine, leaf, upstream.to(DEVICE))[0]
            exact = torch.autograd.grad(reference.nearest_prototype(wide).cosine, wide, upstream.double().to(DEVICE))[0]
            assert ours.dtype == dtype
            assert relative_error(ours, exact) <= 1e-6 + torch.finfo(dtype).eps

    def test_one_neighbour_of_all(self) -> None:
        """A hub: its gradient is a sum over all classes."""
        given = 0.3 * torch.eye(40, 41, device=DEVICE)
        given[:, 40] = 1.0
        given[7] = torch.tensor([0.0] * 40 + [1.0])
        leaf, wide = given.clone().requires_grad_(), given.double().requires_grad_()
        found = nearest_prototype(leaf)
        assert found.index.tolist() == [7] * 7 + [0] + [7] * 32
        weight = torch.linspace(-1, 1, 40, device=DEVICE)
        ours = torch.autograd.grad(found.cosine, leaf, weight)[0]
        exact = torch.autograd.grad(reference.nearest_prototype(wide).cosine, wide, weight.double())[0]
        assert relative_error(ours, exact) <= 1e-6

    def test_finite_where_prototypes_coincide(self) -> None:
        leaf = torch.eye(4, 6, device=DEVICE)
        leaf[3] = leaf[0]
        leaf.requires_grad_()
        value = min_angle_regularizer(leaf)
        value.backward()
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())

    def test_strided_prototypes(self) -> None:
        wide = prototypes(44, 30)
        view = wide[::2, 3:29:2]
        ours, expected = (
            torch.autograd.grad(min_angle_regularizer(leaf), leaf)[0]
            for leaf in (view.detach().requires_grad_(), view.contiguous().requires_grad_())
        )
        assert torch.equal(ours, expected)

    def test_a_single_class_has_none(self) -> None:
        leaf = prototypes(1).requires_grad_()
        min_angle_regularizer(leaf).backward()
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_results_repeat_bit_for_bit(default_algorithms: None) -> None:
    results = []
    for _ in range(2):
        leaf = prototypes(40).requires_grad_()
        cosine, index = nearest_prototype(leaf)
        results.append((cosine, index, torch.autograd.grad(cosine, leaf, torch.ones_like(cosine))[0]))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


ROWS = torch.tensor([3, 3, 30, 0])
CASES: dict[str, Any] = {
    "nearest_prototype": lambda: (prototypes(20, 8), None, False),
    "nearest_prototype rows": lambda: (prototypes(35, 8), ROWS.to(DEVICE), True),
    "nearest_prototype single": lambda: (prototypes(1, 8), None, False),
    "nearest_prototype_gradient": lambda: (
        torch.randn(4, device=DEVICE),
        prototypes(35, 8),
        ROWS.to(DEVICE),
        ROWS.to(DEVICE) + 1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_operator(case: str) -> None:
    """Schema, fake tensors, and tracing with dynamic shapes."""
    torch.library.opcheck(OPERATORS[case.split()[0]]["triton"], CASES[case]())


def test_memory_beside_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bytes a class: a key, the order and 1/‖w‖. Nothing else grows with C."""
    c, kept = 100, 0

    class Counted(LargestTensor):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal kept
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.full):
                kept += result.untyped_storage().nbytes()
            return result

    given = prototypes(c, 8)
    with watching(Counted()):
        nearest_prototype(given)
    tile = tiles.search_tile(tiles.architecture(given.device), F32, "ieee")
    assert 16 * c <= kept - 12 * c <= 16 * c + 4 * tile.classes


def test_long_tail_loss() -> None:
    """Every part of it, on every class and on those of the batch."""
    for rows in ("all", "batch"):
        values = []
        for name, wide in (("triton", F32), ("reference", torch.float64)):
            torch.manual_seed(1)
            counts = long_tail_counts(40)
            options = {"min_angle_weight": 0.5, "min_angle_classes": rows}
            head = ltloss.LongTailLoss.from_counts(counts, 8, **options)
            head = head.to(DEVICE, wide)
            x = torch.linspace(-1, 2, 96, device=DEVICE, dtype=wide).sin().view(12, 8)
            with ltloss.use_backend(name):  # type: ignore[arg-type]
                loss = head(x, torch.arange(12, device=DEVICE) % 7)
                loss.backward()
            values.append((loss.detach(), head.weight.grad))
        for ours, exact in zip(*values, strict=True):
            assert relative_error(ours, exact) <= 2e-5


@triton.jit
def _visit(counts_ptr, tiles, GROUP: tl.constexpr):
    block, tile = triangle_tile(tiles, GROUP)
    if block <= tile:
        tl.atomic_add(counts_ptr + block * tiles + tile, 1)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_every_pair_of_tiles_once(group: int) -> None:
    for count in range(1, 9):
        visits = torch.zeros(count, count, dtype=torch.int32, device=DEVICE)
        squares = -(-count // group)
        _visit[(group * group * (squares + 1), -(-squares // 2))](visits, count, GROUP=group)
        assert torch.equal(visits, torch.ones_like(visits).triu())


@triton.jit
def _keys(value_ptr, number_ptr, key_ptr, back_ptr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    key = order_key(tl.load(value_ptr + at), tl.load(number_ptr + at))
    tl.store(key_ptr + at, key)
    tl.store(back_ptr + at, number_of(key))


def test_keys_order_values_and_then_numbers() -> None:
    sizes = [0.0, 1e-45, 1e-38, 0.5, 1.0, 3e38, math.inf]
    ascending = [-size for size in reversed(sizes[1:])] + sizes + [math.nan]
    numbers = [0x7FFFFFFE, 1 << 30, 128, 1, 0]  # a lower number has the larger key
    values = torch.tensor(np.repeat(ascending, len(numbers)), dtype=F32)
    values = torch.cat([values, values.new_tensor([-0.0, 0.0, -math.nan])]).to(DEVICE)
    number = torch.tensor(numbers * len(ascending) + [7, 7, 0], dtype=torch.int32, device=DEVICE)
    count = 1 << (len(values) - 1).bit_length()
    values, number = (torch.nn.functional.pad(t, (0, count - len(t))) for t in (values, number))
    key = torch.empty(count, dtype=torch.int64, device=DEVICE)
    back = torch.empty_like(number)
    _keys[(1,)](values, number, key, back, COUNT=count)
    assert torch.equal(back, number)
    usual = len(ascending) * len(numbers)
    assert bool((key[1:usual] > key[: usual - 1]).all())
    assert int(key[usual]) == int(key[usual + 1])  # both zeros are one
    assert int(key[usual + 2]) == int(key[usual - 1])  # every NaN is one
    assert int(key.min()) > LOWEST_KEY
