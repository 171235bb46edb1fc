"""The searches on a GPU: are they right, and who is measured: nearest prototype, best classes, and a long-tail step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from ltloss_kernels.config.precision import float32_products
from torch import Tensor
from torch.nn import functional as torch_functional

from benchmarks.loss_gpu.measure import Device
from benchmarks.peers import Shape
from ltloss import LongTailLoss, functional, reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Found = tuple[Tensor, Tensor]

# How far the cosine of what is found may lie below the best one, in float64 on the rounded numbers: ours sums exact
# products in float32, the peers round their cosines to half precision.
OURS, PEERS = 1e-5, 2.0**-7
_SAMPLE = 256  # rows that are compared with float64
_ROWS = 4096  # of the peers' products at a time


def _draw(device: str, rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, width, generator=generator, device=device, dtype=dtype)


def _cosines(rows: Tensor, prototypes: Tensor, own: Tensor | None) -> Tensor:
    """(n, C) in float64; the own class of each row, if there is one, below all others."""
    cosine = reference.direction(rows.double()) @ reference.direction(prototypes.double()).t()
    return cosine if own is None else cosine.scatter(1, own[:, None], -2.0)


def shortfall(found: Found, features: Tensor, prototypes: Tensor, own: Tensor | None = None) -> float:
    """How much the found cosines (n, k) lie below the k best, or differ from their true values; NaN for NaN."""
    cosine = _cosines(features, prototypes, own)
    best = cosine.topk(found[1].shape[1], dim=1).values
    true = cosine.gather(1, found[1])
    repeated = (found[1].sort(dim=1).values.diff(dim=1) == 0).any()
    errors = torch.stack([(best - true).max(), (true - found[0].double()).abs().max(), 2.0 * repeated.double()])
    return float(errors.max())


def nearest_is_right(device: Device) -> str:
    """All rows and some, dtypes, widths that are copied, ties by copies, against float64."""
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
    """Several k, dtypes and chunks, against float64."""
    for n, c, d, k in ((1, 1, 5, 1), (7, 300, 33, 5), (200, 1000, 512, 128), (130, 5000, 64, 10)):
        for dtype in (BF16, FP32):
            features, prototypes = _draw(device.kind, n, d, dtype, 1), _draw(device.kind, c, d, dtype)
            error = shortfall(tuple(functional.top_k(features, prototypes, k)), features, prototypes)
            if not error <= OURS:
                return f"{n}x{c}x{d}, k = {k}, {dtype}: off by {error:.1e}"
    return ""


def minimum_angle_is_right(device: Device) -> str:
    """Value and gradient of the regulariser against float64, also with one neighbour of many; the same bits twice."""
    for dtype, tolerance in ((FP32, 1e-4), (BF16, 2.0**-7)):
        prototypes = _draw(device.kind, 900, 64, dtype)
        prototypes[:400] += 3.0 * prototypes[7]
        counts = torch.arange(1, 901, device=device.kind)
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
    """Something to time: ``build(device, shape)`` checks it and returns it; ``operations`` per N·C·D."""

    phase: str
    shape: Shape
    dtype: torch.dtype
    provider: str
    build: Callable[[str, Shape, torch.dtype], Callable[[], Any]]
    operations: int = 2
    note: str = ""


def _checked(found: Found, allowed: float, features: Tensor, prototypes: Tensor, own: Tensor | None = None) -> None:
    some = torch.arange(features.shape[0], device=features.device)[:: -(-features.shape[0] // _SAMPLE)]
    picked = tuple(tensor[some].view(some.numel(), -1) for tensor in found)
    error = shortfall(picked, features[some], prototypes, None if own is None else own[some])  # type: ignore[arg-type]
    if not error <= allowed:
        raise RuntimeError(f"the cosines found are off by {error:.1e}; not timed")


def _dense_top(features: Tensor, prototypes: Tensor, k: int, rows: int, own: bool) -> Found:
    """Product and maximum (or the k largest) in the inputs' dtype, ``rows`` rows at a time."""
    unit = torch_functional.normalize(prototypes)
    left = unit if own else torch_functional.normalize(features)
    values, indices = [], []
    for start in range(0, left.shape[0], rows):
        cosine = left[start : start + rows] @ unit.t()
        if own:
            cosine.diagonal(offset=start).fill_(-2.0)
        value, index = cosine.max(dim=1, keepdim=True) if k == 1 else cosine.topk(k, dim=1)
        values.append(value)
        indices.append(index)
    return torch.cat(values), torch.cat(indices)


def _nearest(rows: int | None) -> Callable[[str, Shape, torch.dtype], Callable[[], Found]]:
    """Ours (None), or dense with so many rows at a time."""

    def build(device: str, shape: Shape, dtype: torch.dtype) -> Callable[[], Found]:
        prototypes = _draw(device, shape.c, shape.d, dtype)

        def search() -> Found:
            if rows is None:
                return tuple(functional.nearest_prototype(prototypes))  # type: ignore[return-value]
            return _dense_top(prototypes, prototypes, 1, min(rows, shape.c), own=True)

        own = torch.arange(shape.c, device=device)
        _checked(search(), OURS if rows is None else PEERS, prototypes, prototypes, own)
        return search

    return build


def _product_alone(device: str, shape: Shape, dtype: torch.dtype) -> Callable[[], Tensor]:
    prototypes = _draw(device, shape.c, shape.d, dtype)
    cosine = torch.empty(shape.c, shape.c, device=device, dtype=dtype)
    return lambda: torch.mm(prototypes, prototypes.t(), out=cosine)


def _top_k(k: int, rows: int | None) -> Callable[[str, Shape, torch.dtype], Callable[[], Found]]:
    def build(device: str, shape: Shape, dtype: torch.dtype) -> Callable[[], Found]:
        features, prototypes = _draw(device, shape.n, shape.d, dtype, 1), _draw(device, shape.c, shape.d, dtype)
        size = min(k, shape.c)

        def search() -> Found:
            if rows is None:
                return tuple(functional.top_k(features, prototypes, size))  # type: ignore[return-value]
            return _dense_top(features, prototypes, size, rows, own=False)

        _checked(search(), OURS if rows is None else PEERS, features, prototypes)
        return search

    return build


def _long_tail_step(precision: str, **options: Any) -> Callable[[str, Shape, torch.dtype], Callable[[], None]]:
    def build(device: str, shape: Shape, dtype: torch.dtype) -> Callable[[], None]:
        torch.manual_seed(0)
        counts = torch.randint(1, 1000, (shape.c,))
        head = LongTailLoss.from_counts(counts, shape.d, device=device, **options)
        features = _draw(device, shape.n, shape.d, dtype, 1).requires_grad_()
        labels = torch.randint(shape.c, (shape.n,), device=device)

        def step() -> None:
            with float32_products(precision):
                head.zero_grad()
                features.grad = None
                head(features, labels).backward()

        return step

    return build


def search_cases(small: bool) -> Iterator[SearchCase]:
    """Ours first. ``small``: tiny shapes, to try the code."""
    square = Shape(40, 40, 16) if small else Shape(100_000, 100_000, 512)
    for provider, build, note in (
        ("ltloss", _nearest(None), ""),
        ("product alone", _product_alone, "no maximum"),
        ("dense", _nearest(1 << 40), "rounds its cosines"),
        ("row blocks", _nearest(_ROWS), "rounds its cosines"),
    ):
        yield SearchCase("nearest", square, BF16, provider, build, note=note)
    wide = Shape(12, 40, 16) if small else Shape(8192, 131_072, 512)
    for k in (5, 128):
        for provider, rows in (("ltloss", None), ("row blocks", _ROWS)):
            yield SearchCase(f"top {k}", wide, BF16, provider, _top_k(k, rows))
    step = Shape(12, 40, 16) if small else Shape(1024, 100_000, 512)
    for note, build in (
        ("without the minimum angle", _long_tail_step("highest")),
        ("minimum angle, rows=batch", _long_tail_step("highest", min_angle_weight=0.1, min_angle_rows="batch")),
        ("minimum angle, all rows, TF32", _long_tail_step("high", min_angle_weight=0.1)),
        ("minimum angle, all rows", _long_tail_step("highest", min_angle_weight=0.1)),
    ):
        yield SearchCase("long-tail step", step, BF16, "ltloss", build, 8, f"float32 prototypes, {note}")
