"""``python -m benchmarks.loss_cpu``: the loss on a CPU, measured beside the peers.

The rows go to ``results/cpu.csv``. Ratios are ours / theirs from one interleaved run; less than 1 is faster. Absolute
times only describe the machine on which they were measured.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks import parts
from benchmarks.nearest import SEARCHES, check_found
from benchmarks.parts import Row
from benchmarks.peers import (
    LINEAR_ON_CPU,
    ON_CPU,
    SCALAR_MARGIN,
    SCALE,
    Inputs,
    Shape,
    check_step,
    exact_step,
    run_step,
)
from benchmarks.timing import RESULTS, fresh_processes, interleaved, judged, paired_ratio, peak_extra_bytes, stamp
from ltloss import CosineSoftmaxLoss, LongTailLoss, functional, reference, use_workspace

TRAINING_STEP = Shape(256, 100_000, 256)
SCALING = [Shape(128, classes, 128) for classes in (10_000, 30_000, 100_000, 300_000, 1_000_000)]
NEAREST = Shape(0, 20_000, 256)
REGULARIZER = Shape(256, 20_000, 256)
SUB_CENTERS = Shape(256, 33_333, 256)
MILLION = Shape(128, 1_000_000, 128)


# Goals set before measuring: (case, provider) -> the most that its ratio may be.
GOALS = {
    ("training step", "pytorch-metric-learning"): 0.40,
    ("training step", "linear_cross_entropy"): 0.95,
    ("linear softmax", "linear_cross_entropy"): 0.95,
    ("own products", "its four products"): 1.2,
    ("trade", "ltloss, exponentials kept"): 0.80,
    ("sub-centres", "ArcFace, 3 sub-centres"): 1.1,
}


def _row(case: str, shape: Shape, provider: str, seconds: Sequence[float], **more: Any) -> Row:
    milliseconds = [1e3 * second for second in seconds]
    if most := GOALS.get((case, provider)):
        more["goal"] = judged("ratio", float(more.get("ratio_ours_to_theirs") or more["ratio_to_default"]), most)
    return {
        "case": case,
        "N": shape.n,
        "C": shape.c,
        "D": shape.d,
        "dtype": "float32",
        "provider": provider,
        "median_ms": f"{statistics.median(milliseconds):.3f}",
        "min_ms": f"{min(milliseconds):.3f}",
        "max_ms": f"{max(milliseconds):.3f}",
        "repeats": len(milliseconds),
        **more,
    }


def _left_out(name: str, reason: ImportError) -> None:
    print(f"{name} is left out: {reason} (pip install 'ltloss[bench]')")


def step_bytes(name: str, shape: Shape, linear: bool = False) -> int:
    """Bytes that one forward and backward takes beyond parameters, inputs and gradients."""
    provider = next(provider for provider in (LINEAR_ON_CPU if linear else ON_CPU) if provider.name == name)
    # The warm-up loads libraries and starts threads. A compiled function warms up at its full shape, for which it is
    # compiled.
    warm_up = Inputs.draw(shape if provider.compiled else Shape(8, 32, shape.d))
    run_step(provider.build(warm_up), warm_up)
    inputs = warm_up if provider.compiled else Inputs.draw(shape)
    step = partial(run_step, provider.build(inputs), inputs)
    if provider.compiled:
        step()
    return peak_extra_bytes(step, inputs.drop_gradients) - inputs.gradient_bytes


def search_bytes(name: str, shape: Shape) -> int:
    """Bytes that one nearest-prototype search takes beyond the prototypes and the result (12 bytes a class)."""
    kept: list[object] = []
    with torch.no_grad():
        SEARCHES[name](torch.randn(32, shape.d))
        prototypes = torch.randn(shape.c, shape.d)
        return peak_extra_bytes(lambda: kept.append(SEARCHES[name](prototypes)), lambda: None) - 12 * shape.c


def _peak(measure: Callable[[str, Shape], int], provider: str, shape: Shape) -> str:
    with fresh_processes(1) as pool:
        return f"{pool.submit(measure, provider, shape).result() / (1 << 20):.1f}"


def training_step(shape: Shape, rounds: int, linear: bool = False) -> list[Row]:
    """Forward and backward beside every peer: with angular margins per class, or softmax of a ``linear`` layer."""
    inputs = Inputs.draw(shape)
    steps: dict[str, Callable[[], Any]] = {}
    more: dict[str, Row] = {}
    for provider in LINEAR_ON_CPU if linear else ON_CPU:
        try:
            loss = provider.build(inputs)
        except ImportError as reason:
            _left_out(provider.name, reason)
            continue
        error = check_step(provider.name, loss, inputs, exact_step(provider.truth, inputs))
        steps[provider.name] = partial(run_step, loss, inputs)
        more[provider.name] = {"relative_error": f"{error:.1e}", "note": provider.note}
    case = "linear softmax" if linear else "training step"
    return _beside(case, shape, steps, partial(step_bytes, linear=linear), rounds, more)


def own_products(shape: Shape, rounds: int) -> list[Row]:
    """Our training step beside its four products of 2·N·C·D alone, at the library's rate: what is left to save."""
    inputs, ours = Inputs.draw(shape), ON_CPU[0]
    loss = ours.build(inputs)
    error = check_step(ours.name, loss, inputs, exact_step(ours.truth, inputs))
    x, w, logits = inputs.features.detach(), inputs.prototypes.detach(), torch.empty(shape.n, shape.c)
    dx, dw = torch.empty_like(x), torch.empty_like(w)

    def products() -> None:
        for _ in range(2):  # the backward computes the logits again
            torch.mm(x, w.t(), out=logits)
        torch.mm(logits, w, out=dx)
        torch.mm(logits.t(), x, out=dw)

    seconds = interleaved({"ltloss": partial(run_step, loss, inputs), "its four products": products}, rounds)
    ratio = f"{paired_ratio(seconds['ltloss'], seconds['its four products']):.3f}"
    more = {"ltloss": {"relative_error": f"{error:.1e}"}, "its four products": {"ratio_ours_to_theirs": ratio}}
    return [_row("own products", shape, name, times, **more[name]) for name, times in seconds.items()]


@contextmanager
def _products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _kept() -> Iterator[None]:
    with use_workspace(1 << 30, keep_exponentials=True):
        yield


@contextmanager
def _both() -> Iterator[None]:
    with _kept(), _products("medium"):
        yield


# Options that trade precision or memory for time.
TRADES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "exponentials kept": _kept,
    "products in medium": partial(_products, "medium"),
    "both": _both,
}


def _traded(name: str, step: Callable[[], Any]) -> Any:
    with TRADES[name]():
        return step()


def traded_bytes(name: str, shape: Shape) -> int:
    """Bytes of our step with this option, as :func:`step_bytes` counts them."""
    return int(_traded(name, partial(step_bytes, ON_CPU[0].name, shape)))


def trades(shape: Shape, rounds: int) -> list[Row]:
    """Our training step with each option of ``TRADES``, beside the plain step; ``ratio_to_default`` < 1 is faster."""
    inputs, ours = Inputs.draw(shape), ON_CPU[0]
    loss, exact = ours.build(inputs), exact_step(ours.truth, inputs)
    step = partial(run_step, loss, inputs)
    error = {name: _traded(name, partial(check_step, name, loss, inputs, exact)) for name in TRADES}
    seconds = interleaved({"": step, **{name: partial(_traded, name, step) for name in TRADES}}, rounds)
    return [
        _row(
            "trade",
            shape,
            f"ltloss, {name}",
            seconds[name],
            ratio_to_default=f"{paired_ratio(seconds[name], seconds['']):.3f}",
            extra_mib=_peak(traded_bytes, name, shape),
            relative_error=f"{error[name]:.1e}",
        )
        for name in TRADES
    ]


def nearest(shape: Shape, rounds: int) -> list[Row]:
    """The nearest-prototype searches, ours beside the dense product with its maximum and others."""
    prototypes = torch.randn(shape.c, shape.d, generator=torch.Generator().manual_seed(0))
    steps: dict[str, Callable[[], Any]] = {}
    more: dict[str, Row] = {}
    for name, search in SEARCHES.items():
        try:
            found = search(prototypes)
        except ImportError as reason:
            _left_out(name, reason)
            continue
        error = check_found(found, 1e-6, prototypes, prototypes, torch.arange(shape.c), sample=512)
        steps[name] = partial(search, prototypes)
        more[name] = {"relative_error": f"{error:.1e}"}
    with torch.no_grad():
        return _beside("nearest prototype", shape, steps, search_bytes, rounds, more)


def _beside(
    case: str,
    shape: Shape,
    steps: Mapping[str, Callable[[], Any]],
    measure: Callable[[str, Shape], int],
    rounds: int,
    more: Mapping[str, Row],
) -> list[Row]:
    """A row for each provider: its time, the ratio of ours to it, and its memory by ``measure``."""
    seconds = interleaved(steps, rounds)
    return [
        _row(
            case,
            shape,
            name,
            times,
            ratio_ours_to_theirs=f"{paired_ratio(seconds['ltloss'], times):.3f}",
            extra_mib=_peak(measure, name, shape),
            **more[name],
        )
        for name, times in seconds.items()
    ]


def scaling(shapes: Sequence[Shape], rounds: int) -> list[Row]:
    """Time and memory of our training step over the number of classes: time should be linear, memory constant."""
    ours = ON_CPU[0]
    repeats = {shape: max(1, 100_000 // shape.c) for shape in shapes}  # short cases run long enough to be timed
    steps: dict[str, Callable[[], Any]] = {}
    errors = {}
    for shape in shapes:
        inputs = Inputs.draw(shape)
        loss = ours.build(inputs)
        # Of a million classes, the dense float64 reference fits only a few samples at a time.
        rows = max(1, (1 << 25) // shape.c)
        errors[shape] = f"{check_step(ours.name, loss, inputs, exact_step(ours.truth, inputs, rows)):.1e}"
        inputs.drop_gradients()
        steps[str(shape)] = partial(_repeated, partial(run_step, loss, inputs), repeats[shape])
    seconds = interleaved(steps, rounds)
    per_step = {shape: [second / repeats[shape] for second in seconds[str(shape)]] for shape in shapes}
    return [
        _row(
            "scaling",
            shape,
            "ltloss",
            times,
            extra_mib=_peak(step_bytes, "ltloss", shape),
            ns_per_class=f"{1e9 * statistics.median(times) / shape.c:.1f}",
            relative_error=errors[shape],
        )
        for shape, times in per_step.items()
    ]


def _repeated(step: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        step()


def regularizer(shape: Shape, rounds: int) -> list[Row]:
    """A step of the long-tail loss: without minimum-angle term, with that of the batch's classes, and of all classes.

    ``share``: the fraction of the step that the term takes.
    """
    torch.manual_seed(0)
    features, labels = torch.randn(shape.n, shape.d), torch.randint(shape.c, (shape.n,))
    counts = torch.randint(1, 1000, (shape.c,))
    variants: dict[str, dict[str, Any]] = {
        "without": {"min_angle_weight": 0.0},
        "rows=batch": {"min_angle_weight": 0.1, "min_angle_classes": "batch"},
        "all rows": {"min_angle_weight": 0.1},
    }

    def step(head: LongTailLoss) -> None:
        head.zero_grad()
        head(features, labels).backward()

    heads = {name: LongTailLoss.from_counts(counts, shape.d, **options) for name, options in variants.items()}
    seconds = interleaved({name: partial(step, head) for name, head in heads.items()}, rounds, warm_up=1)
    shares = {name: f"{1.0 - paired_ratio(seconds['without'], times):.3f}" for name, times in seconds.items()}
    return [_row("minimum angle", shape, f"ltloss, {name}", seconds[name], share=shares[name]) for name in variants]


def _arcface(function: Callable[..., Any], centers: int, inputs: Inputs) -> Any:
    """ArcFace whose prototypes (K·C, D) are K = ``centers`` consecutive rows for each class."""
    prototypes = inputs.prototypes
    if centers > 1:
        prototypes = prototypes.view(-1, centers, prototypes.shape[1])
    return function(inputs.features, prototypes, inputs.labels, scale=SCALE, angular_margin=SCALAR_MARGIN)


def sub_centers(shape: Shape, rounds: int, centers: int = 3) -> list[Row]:
    """ArcFace with K sub-centres a class, beside ArcFace with K·C classes, which has as many products and no maximum.

    ``ratio_to_default``: time over that of K·C classes; the goal is at most 1.1.
    """
    inputs = Inputs.draw(Shape(shape.n, centers * shape.c, shape.d))
    inputs.labels %= shape.c  # classes that both have
    steps: dict[str, Callable[[], Any]] = {}
    errors = {}
    for name, count in (("classes", 1), ("sub-centres", centers)):
        loss, truth = (partial(_arcface, module.margin_cross_entropy, count) for module in (functional, reference))
        errors[name] = f"{check_step(name, partial(loss, inputs), inputs, exact_step(truth, inputs)):.1e}"
        steps[name] = partial(run_step, partial(loss, inputs), inputs)
    seconds = interleaved(steps, rounds)
    ratio = f"{paired_ratio(seconds['sub-centres'], seconds['classes']):.3f}"
    shown: tuple[tuple[str, Shape, str, Row], ...] = (
        ("classes", Shape(shape.n, centers * shape.c, shape.d), f"ArcFace, {centers}C classes", {}),
        ("sub-centres", shape, f"ArcFace, {centers} sub-centres", {"ratio_to_default": ratio}),
    )
    return [
        _row("sub-centres", size, title, seconds[name], relative_error=errors[name], **more)
        for name, size, title, more in shown
    ]


def million_classes(shape: Shape, steps: int = 3) -> list[Row]:
    """Training steps with torch's SGD at a million classes; raises RuntimeError unless the loss on the batch falls."""
    torch.manual_seed(0)
    head = CosineSoftmaxLoss(shape.c, shape.d)
    optimizer = torch.optim.SGD(head.parameters(), lr=10.0)
    features, labels = torch.randn(shape.n, shape.d), torch.randint(shape.c, (shape.n,))
    losses: list[float] = []

    def train() -> None:
        optimizer.zero_grad()
        loss = head(features, labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    seconds = interleaved({"train": train}, steps, warm_up=1)["train"]
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"{shape.c} classes do not train: losses {losses}")
    return [_row("training with SGD", shape, "ltloss", seconds, note=f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")]


_OPTIONAL = {
    "ratio_ours_to_theirs": "ours/theirs {}",
    "ratio_to_default": "{} of the time without",
    "share": "the term's share {}",
    "extra_mib": "extra {} MiB",
    "ns_per_class": "{} ns/class",
    "relative_error": "error {}",
    "note": "({})",
    "goal": "{}",
}


def parts_of(rounds: int) -> parts.Parts:
    """What measures each part."""
    fewer = max(3, rounds // 2)
    return {
        "training step": lambda: training_step(TRAINING_STEP, rounds),
        "linear softmax": lambda: training_step(TRAINING_STEP, rounds, linear=True),
        "own products": lambda: own_products(TRAINING_STEP, rounds),
        "trade": lambda: trades(TRAINING_STEP, rounds),
        "sub-centres": lambda: sub_centers(SUB_CENTERS, rounds),
        "nearest prototype": lambda: nearest(NEAREST, fewer),
        "minimum angle": lambda: regularizer(REGULARIZER, fewer),
        "scaling": lambda: scaling(SCALING, fewer),
        "training with SGD": lambda: million_classes(MILLION),
    }


def main() -> None:
    """Measure the parts, print and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=11, help="timed repeats per provider, interleaved (default 11)")
    parts.add_arguments(parser, parts_of(1), RESULTS / "cpu.csv")
    given = parser.parse_args()
    common = stamp()
    print(f"{common['device']}, {common['threads']} threads, torch {common['torch']}, load {common['load']}")
    parts.measure(parts_of(given.rounds), given, common, "provider", _OPTIONAL)


if __name__ == "__main__":
    main()
