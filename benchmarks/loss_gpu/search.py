"""The searches on a GPU: checks of nearest prototype, top-k and minimum angle, and the cases that are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from ltloss_kernels.config.precision import float32_products
from torch import Tensor

from benchmarks.loss_gpu.measure import Device
from benchmarks.nearest import Found, check_found, dense_top, shortfall
from benchmarks.peers import Shape
from ltloss import LongTailLoss, functional, reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The largest shortfall of a found cosine, in float64 on the rounded numbers: ours sums exact products in float32, the
# peers round their cosines to half precision.
OURS, PEERS = 1e-5, 2.0**-7
_ROWS = 4096  # of the peers' products at a time


def _draw(device: str, rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, width, generator=generator, device=device, dtype=dtype)


def nearest_is_right(device: Device) -> str:
    """Nearest prototypes against float64: all rows and some, several dtypes, widths that need copies, and ties."""
    for c, d, dtype in ((5, 3, FP32), (300, 72, BF16), (1000, 512, BF16), (777, 33, FP16), (1300, 96, FP32)):
        prototypes = _draw(device.kind, c, d, dtype)
        prototypes[c - 1] = prototypes[1]
        for rows in (None, torch.tensor([c - 1, 0, 1, 0], device=device.kind)):
            cosine, index = functional.nearest_prototype(prototypes, rows)
            own = torch.arange(c, device=device.kind) if rows is None else rows
            error = shortfall((cosine[:, None], index[:, None]), prototypes[own], prototypes, own)
            if not error <= OURS:
                return f"{c}x{d} {dtype}, rows {rows}: off by {error:.1e}"
            if int(index[own == 1][0]) != c - 1 or int(index[own == c - 1][0]) != 1:
                return f"{c}x{d} {dtype}: of two copies another is nearest"
    return ""


def top_k_is_right(device: Device) -> str:
    """Top-k against float64: several k, dtypes and chunks."""
    for n, c, d, k in ((1, 1, 5, 1), (7, 300, 33, 5), (200, 1000, 512, 128), (130, 5000, 64, 10)):
        for dtype in (BF16, FP32):
            features, prototypes = _draw(device.kind, n, d, dtype, 1), _draw(device.kind, c, d, dtype)
            error = shortfall(tuple(functional.top_k(features, prototypes, k)), features, prototypes)
            if not error <= OURS:
                return f"{n}x{c}x{d}, k = {k}, {dtype}: off by {error:.1e}"
    return ""


def minimum_angle_is_right(device: Device) -> str:
    """Value and gradient of the regulariser against float64, and equal bits twice; many classes share a neighbour."""
    c, around = 2000, 1400  # so many share a nearest one, whose gradient then has several chunks and a rest
    for dtype, tolerance in ((FP32, 1e-4), (BF16, 2.0**-7)):
        prototypes = _draw(device.kind, c, 64, dtype)
        prototypes[:around] += 3.0 * prototypes[7]
        counts = torch.arange(1, c + 1, device=device.kind)
        outcomes = []
        for function, wide in (
            *[(functional.min_angle_regularizer, dtype)] * 2,
            (reference.min_angle_regularizer, None),
        ):
            leaf = prototypes.to(wide or torch.float64).requires_grad_()
            value = function(leaf, counts)
            outcomes.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
        first, second, exact = outcomes
        if not all(torch.equal(one, other) for one, other in zip(first, second, strict=True)):
            return f"{dtype}: two runs differ"
        for name, ours, true in zip(("value", "gradient"), first, exact, strict=True):
            error = float((ours.double() - true).norm() / true.norm())
            if not error <= tolerance:
                return f"{dtype}: the {name} is off by {error:.1e}"
    return ""


PROPERTIES: tuple[Callable[[Device], str], ...] = (nearest_is_right, top_k_is_right, minimum_angle_is_right)


class SearchCase(NamedTuple):
    """A function to time: ``build(device, shape, dtype)`` makes and checks it; ``operations`` are per N·C·D."""

    phase: str
    shape: Shape
    dtype: torch.dtype
    provider: str
    build: Callable[[str, Shape, torch.dtype], Callable[[], Any]]
    operations: int = 2
    note: str = ""
    allocates: bool = True  # False for a replayed graph, whose memory was allocated at its capture


def _search(k: int | None, rows: int | None, device: str, shape: Shape, dtype: torch.dtype) -> Callable[[], Found]:
    """A search for the k best classes, nearest prototypes if k is None; ours if rows is None, else dense in blocks."""
    prototypes = _draw(device, shape.c, shape.d, dtype)
    features = prototypes if k is None else _draw(device, shape.n, shape.d, dtype, 1)
    own = torch.arange(shape.c, device=device) if k is None else None
    size = min(k or 1, shape.c)

    def search() -> Found:
        if rows is not None:
            return dense_top(features, prototypes, size, min(rows, shape.c), own=k is None)
        return functional.nearest_prototype(prototypes) if k is None else functional.top_k(features, prototypes, size)

    check_found(search(), OURS if rows is None else PEERS, features, prototypes, own)
    return search


def _product_alone(device: str, shape: Shape, dtype: torch.dtype) -> Callable[[], Tensor]:
    prototypes = _draw(device, shape.c, shape.d, dtype)
    cosine = torch.empty(shape.c, shape.c, device=device, dtype=dtype)
    return lambda: torch.mm(prototypes, prototypes.t(), out=cosine)


def _long_tail_step(
    options: dict[str, Any], precision: str, device: str, shape: Shape, dtype: torch.dtype
) -> Callable[[], None]:
    torch.manual_seed(0)
    counts = torch.randint(1, 1000, (shape.c,))
    head = LongTailLoss.from_counts(counts, shape.d, device=device, **options)
    features = _draw(device, shape.n, shape.d, dtype, 1).requires_grad_()
    labels = torch.randint(shape.c, (shape.n,), device=device)

    def step() -> None:
        with float32_products(precision):
            head(features, labels).backward()
        head.zero_grad()  # so that gradients count as memory of the next step, not of what was there before
        features.grad = None

    return step


def search_cases(small: bool) -> Iterator[SearchCase]:
    """The cases, ours first. ``small``: tiny shapes, to try the code."""
    square, wide, step = Shape(100_000, 100_000, 512), Shape(8192, 131_072, 512), Shape(1024, 100_000, 512)
    if small:
        square, wide, step = Shape(40, 40, 16), Shape(12, 40, 16), Shape(12, 40, 16)
    rounds = "rounds its cosines"
    yield SearchCase("nearest", square, BF16, "ltloss", partial(_search, None, None))
    yield SearchCase("nearest", square, BF16, "product alone", _product_alone, note="no maximum")
    yield SearchCase("nearest", square, BF16, "dense", partial(_search, None, 1 << 40), note=rounds)
    yield SearchCase("nearest", square, BF16, "row blocks", partial(_search, None, _ROWS), note=rounds)
    for k in (5, 128):
        yield SearchCase(f"top {k}", wide, BF16, "ltloss", partial(_search, k, None))
        yield SearchCase(f"top {k}", wide, BF16, "row blocks", partial(_search, k, _ROWS))
    all_rows: dict[str, Any] = {"min_angle_weight": 0.1}
    for note, options, precision in (
        ("without the minimum angle", {}, "highest"),
        ("minimum angle, rows=batch", {**all_rows, "min_angle_classes": "batch"}, "highest"),
        ("minimum angle, all rows, TF32", all_rows, "high"),
        ("minimum angle, all rows", all_rows, "highest"),
    ):
        build = partial(_long_tail_step, options, precision)
        yield SearchCase("long-tail step", step, BF16, "ltloss", build, 8, f"float32 prototypes, {note}")
