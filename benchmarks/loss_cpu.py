"""``python -m benchmarks.loss_cpu``: the CPU figures of the README, measured beside the peers.

Written to ``results/cpu.csv``. Ratios are ours / theirs from one interleaved run (< 1 is faster); absolute times only
describe the machine they were taken on.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.nearest import check_search, nearest_providers
from benchmarks.peers import Inputs, Shape, check_step, exact_step, run_step, training_step_providers
from benchmarks.timing import MIB, RESULTS, in_fresh_process, interleaved, paired_ratio, stamp, write_rows
from ltloss import CosineSoftmaxLoss, LongTailLoss

Row = dict[str, Any]

TRAINING_STEP = Shape(256, 100_000, 256)
SCALING = [Shape(128, classes, 128) for classes in (10_000, 30_000, 100_000, 300_000, 1_000_000)]
NEAREST = Shape(0, 20_000, 256)
REGULARIZER = Shape(256, 20_000, 256)


def _row(case: str, shape: Shape, provider: str, seconds: Sequence[float], **more: Any) -> Row:
    milliseconds = [1e3 * second for second in seconds]
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


def _peak(kind: str, provider: str, shape: Shape) -> str:
    sizes = [str(size) for size in (shape.n, shape.c, shape.d)]
    return f"{in_fresh_process('benchmarks.peak_memory', kind, provider, *sizes) / MIB:.1f}"


def training_step(shape: Shape, rounds: int) -> list[Row]:
    """Forward and backward with per-class angular margins, beside every peer."""
    inputs = Inputs.draw(shape)
    providers = training_step_providers()
    losses = {provider.name: provider.build(inputs) for provider in providers}
    errors = {
        provider.name: check_step(provider.name, losses[provider.name], inputs, exact_step(provider.truth, inputs))
        for provider in providers
    }
    steps: dict[str, Callable[[], Any]] = {
        name: (lambda loss=loss: run_step(loss, inputs)) for name, loss in losses.items()
    }
    seconds = interleaved(steps, rounds)
    return [
        _row(
            "training step",
            shape,
            provider.name,
            seconds[provider.name],
            ratio_ours_to_theirs=f"{paired_ratio(seconds['ltloss'], seconds[provider.name]):.3f}",
            extra_mib=_peak("step", provider.name, shape),
            relative_error=f"{errors[provider.name]:.1e}",
            note=provider.note,
        )
        for provider in providers
    ]


def scaling(shapes: Sequence[Shape], rounds: int) -> list[Row]:
    """Time and memory of our training step from 10 thousand to a million classes: linear, and flat."""
    ours = training_step_providers()[0]
    steps: dict[str, Callable[[], Any]] = {}
    errors = {}
    for shape in shapes:
        inputs = Inputs.draw(shape)
        loss = ours.build(inputs)
        # The dense float64 truth of a million classes fits a few samples at a time.
        exact = exact_step(ours.truth, inputs, rows=max(1, (1 << 25) // shape.c))
        errors[shape] = f"{check_step(ours.name, loss, inputs, exact):.1e}"
        del exact
        inputs.drop_gradients()

        def step(loss: Callable[[], torch.Tensor] = loss, inputs: Inputs = inputs) -> None:
            for _ in range(max(1, 100_000 // inputs.prototypes.shape[0])):  # short cases run long enough to be timed
                run_step(loss, inputs)

        steps[str(shape)] = step
    seconds = interleaved(steps, rounds)
    rows = []
    for shape in shapes:
        repeats = max(1, 100_000 // shape.c)
        per_step = [second / repeats for second in seconds[str(shape)]]
        per_class = f"{1e9 * statistics.median(per_step) / shape.c:.1f}"
        peak = _peak("step", "ltloss", shape)
        rows.append(
            _row(
                "scaling",
                shape,
                "ltloss",
                per_step,
                extra_mib=peak,
                ns_per_class=per_class,
                relative_error=errors[shape],
            )
        )
    return rows


def nearest(shape: Shape, rounds: int) -> list[Row]:
    """The nearest prototype of every class, beside the dense product and maximum."""
    prototypes = torch.randn(shape.c, shape.d, generator=torch.Generator().manual_seed(0))
    providers = nearest_providers()
    errors = {name: check_search(search, prototypes) for name, search in providers.items()}
    steps: dict[str, Callable[[], Any]] = {
        name: (lambda search=search: search(prototypes)) for name, search in providers.items()
    }
    with torch.no_grad():
        seconds = interleaved(steps, rounds)
    return [
        _row(
            "nearest prototype",
            shape,
            name,
            seconds[name],
            ratio_ours_to_theirs=f"{paired_ratio(seconds['ltloss'], seconds[name]):.3f}",
            extra_mib=_peak("nearest", name, shape),
            relative_error=f"{errors[name]:.1e}",
        )
        for name in providers
    ]


def regularizer(shape: Shape, rounds: int) -> list[Row]:
    """A training step of the long-tail loss without its minimum-angle term, with that of the batch, and with all of it.

    ``share``: the part of the step that the term takes.
    """
    torch.manual_seed(0)
    features, labels = torch.randn(shape.n, shape.d), torch.randint(shape.c, (shape.n,))
    counts = torch.randint(1, 1000, (shape.c,))
    variants: dict[str, dict[str, Any]] = {
        "without": {"min_angle_weight": 0.0},
        "rows=batch": {"min_angle_weight": 0.1, "min_angle_rows": "batch"},
        "all rows": {"min_angle_weight": 0.1},
    }
    steps: dict[str, Callable[[], Any]] = {}
    for name, options in variants.items():
        head = LongTailLoss.from_counts(counts, shape.d, **options)

        def step(head: LongTailLoss = head) -> None:
            head.zero_grad()
            head(features, labels).backward()

        steps[name] = step
    seconds = interleaved(steps, rounds, warm_up=1)
    return [
        _row(
            "minimum angle",
            shape,
            f"ltloss, {name}",
            seconds[name],
            share=f"{1.0 - paired_ratio(seconds['without'], seconds[name]):.3f}",
        )
        for name in variants
    ]


def million_classes(steps: int = 3) -> list[Row]:
    """A real optimizer step at a million classes: the loss on one batch must fall."""
    shape = Shape(128, 1_000_000, 128)
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
        raise RuntimeError(f"a million classes do not train: losses {losses}")
    return [_row("training with SGD", shape, "ltloss", seconds, note=f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")]


def _show(rows: Sequence[Row]) -> None:
    for row in rows:
        shape = f"{row['N']}x{row['C']}x{row['D']}"
        parts = [f"{row['case']:18} {shape:16} {row['provider']:30} {float(row['median_ms']):10.1f} ms"]
        if row.get("ratio_ours_to_theirs"):
            parts.append(f"ours/theirs {row['ratio_ours_to_theirs']}")
        if row.get("share"):
            parts.append(f"the term's share {row['share']}")
        if row.get("extra_mib"):
            parts.append(f"extra {row['extra_mib']} MiB")
        if row.get("ns_per_class"):
            parts.append(f"{row['ns_per_class']} ns/class")
        if row.get("note"):
            parts.append(f"({row['note']})")
        print("  ".join(parts), flush=True)


def main() -> None:
    """Run every case, show the rows as they come and write them all at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=11, help="timed repeats per provider, interleaved (default 11)")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.csv", help="CSV to write")
    arguments = parser.parse_args()
    common = stamp()
    print(
        f"{common['device']}, {common['threads']} threads, torch {common['torch']}, load {common['load']}", flush=True
    )
    rows: list[Row] = []
    for measure in (
        lambda: training_step(TRAINING_STEP, arguments.rounds),
        lambda: nearest(NEAREST, max(3, arguments.rounds // 2)),
        lambda: regularizer(REGULARIZER, max(3, arguments.rounds // 2)),
        lambda: scaling(SCALING, max(3, arguments.rounds // 2)),
        million_classes,
    ):
        measured = measure()
        _show(measured)
        rows += measured
    write_rows([{**common, **row} for row in rows], arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
