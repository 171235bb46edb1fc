"""``python -m benchmarks.loss_gpu``: is the loss right on this GPU, how fast is it, and which tiles are fastest?

Three stages, each of which can be run alone (``--stage``):

1. correctness: properties that only a GPU can break (graphs, large tensors); then every loss against float64, with
   compiled kernels and each assembler that Triton brings. In processes whose crash, or hanging, costs one case only.
2. times: forward and backward separately, ours at every shape, then the peers. Each is beside a large bf16 product,
   which gives P, the rate that the GPU reaches at that moment. If something failed before, it is timed all the same,
   and the rows say what failed.
3. tiles: every candidate tile, other slabs and other products; winners are printed as lines of the tile table.

It ends within ``--minutes`` whatever happens, and writes each result as soon as it is known: rows to
``results/<device>.csv``, ``-correctness.csv`` and ``-tiles.csv``, findings to ``.txt``. Exit codes: 0 fine, 1 something
is wrong, 2 cannot run here, 3 stopped at the deadline.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_gpu import correctness, system, tiles, times
from benchmarks.loss_gpu.apart import Answer
from benchmarks.loss_gpu.measure import Deadline, Device, ends_within
from benchmarks.loss_gpu.times import TINY, Bench
from benchmarks.peers import ON_GPU, Shape
from benchmarks.timing import RESULTS, write_rows

STAGES = ("correctness", "times", "tiles")
# The fraction of the time left at its beginning that a stage may take.
_SHARE = {"correctness": 0.4, "times": 0.75, "tiles": 1.0}

MAIN = (Shape(8192, 131_072, 512), Shape(4096, 1_000_000, 512), Shape(8192, 131_072, 4096))
OTHERS = (
    *(Shape(8192, 131_072, width) for width in (128, 256, 1024)),
    Shape(4096, 131_072, 1024),
    Shape(256, 1_000_000, 512),
)


def _assemblers(device: Device) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The version of each assembler, and the variables that select it; Triton's own choice comes first."""
    if not device.is_cuda:
        yield "", {}
        return
    from ltloss_kernels.config import assembler, tile_table

    arch = tile_table.architecture(torch.device("cuda"))
    usual = assembler.assembler(arch)
    for one in sorted(assembler.assemblers(), key=lambda one: one != usual):
        yield one.version, {assembler.variable(arch): one.path}


def check(bench: Bench, quick: bool) -> None:
    """Stage 1. Every later row names what failed here; times are measured all the same."""
    processes = min(8, (os.cpu_count() or 2) // 2) if bench.device.is_cuda else 0
    todo = system.properties(bench.device, quick)
    properties = system.check_all(bench.device, bench.deadline.share(0.4), todo, processes, bench.tell)
    bench.tell(
        f"properties: {properties.compared} checked, {properties.left_out} left out for time, "
        f"{len(properties.wrong)} wrong"
    )
    bench.failed |= bool(properties.wrong)
    bench.stamp["failed_properties"] = "; ".join([*_compare(bench, quick, processes), *properties.wrong])


def _compare(bench: Bench, quick: bool, processes: int) -> list[str]:
    """Compare every case with float64, with each assembler; return how many are wrong with each, in words."""
    rows: list[dict[str, Any]] = []
    output = None if bench.output is None else bench.output.with_name(f"{bench.output.stem}-correctness.csv")
    failed: list[str] = []
    versions = list(_assemblers(bench.device))
    for number, (version, environment) in enumerate(versions):
        by = f" (ptxas {version})" if version else ""

        def tell(name: str, answer: Answer, by: str = by, version: str = version) -> None:
            verdict: correctness.Verdict | None = answer.value
            problem = answer.problem or (verdict.problem() if verdict else "")
            errors = verdict.row() if verdict else {}
            rows.append({**bench.stamp, "ptxas": version, "case": name, "problem": problem, **errors})
            if output is not None:
                write_rows(rows, output)
            if problem:
                bench.tell(f"{problem}: {name}{by}")

        share = bench.deadline.share(1.0 / (len(versions) - number))
        summary = correctness.check_all(bench.device.kind, share, quick, processes, environment, tell)
        bench.tell(
            f"correctness{by}: {summary.compared} comparisons with float64, {summary.left_out} left out for time, "
            f"{len(summary.wrong)} wrong, {len(summary.inaccurate)} less accurate than promised; "
            f"worst error {summary.worst:.2f} of what is allowed"
        )
        failed += [f"{len(summary.wrong)} comparisons{by}"] * bool(summary.wrong)
        bench.failed |= bool(summary.wrong or summary.inaccurate)
    return failed


def _shape(text: str) -> Shape:
    numbers = re.fullmatch(r"(\d+)[x,](\d+)[x,](\d+)", text)
    if not numbers or not all(int(number) for number in numbers.groups()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NxCxD, for instance 8192x131072x512")
    return Shape(*(int(number) for number in numbers.groups()))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes, to try the code")
    parser.add_argument("--minutes", type=float, default=8.5, help="the run ends by then (default: 8.5)")
    parser.add_argument("--repeats", type=int, default=20, help="timed repeats (default: 20)")
    parser.add_argument("--shape", type=_shape, action="append", metavar="NxCxD", help="instead of the usual shapes")
    names = [provider.name for provider in ON_GPU]
    parser.add_argument("--provider", action="append", choices=names, help="only these (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer comparisons, one shape, no peers at large shapes")
    stages = ", ".join(STAGES)
    parser.add_argument("--stage", action="append", choices=STAGES, help=f"only this (default: {stages}, in turn)")
    parser.add_argument("--output", type=Path, help="CSV to write (default: results/<device>.csv; none for cpu)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure and write; the module's docstring lists the exit codes."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu tries the code on tiny shapes", file=sys.stderr)
        return 2
    device = Device(options.device)
    output = options.output
    if output is None and device.is_cuda:
        output = RESULTS / (re.sub(r"[^a-z0-9]+", "-", device.name().lower()).strip("-") + ".csv")
    deadline = Deadline(0.94 * 60 * options.minutes)
    providers = [one for one in ON_GPU if options.provider is None or one.name in options.provider]
    bench = Bench(device, deadline, output, repeats=options.repeats, providers=providers)
    shapes = options.shape or ((*MAIN, *OTHERS) if device.is_cuda else TINY)
    shapes = shapes[:1] if options.quick else shapes
    print(", ".join(f"{name} {value}" for name, value in bench.stamp.items()), flush=True)
    quick = options.quick or not device.is_cuda
    with ends_within(60 * options.minutes, bench.write):
        for stage in options.stage or (STAGES if device.is_cuda else STAGES[:2]):
            bench.deadline = deadline.share(1.0 if options.stage else _SHARE[stage])
            if stage == "correctness":
                check(bench, quick)
            elif stage == "times":
                times.run(bench, shapes, options.quick, usual=options.shape is None)
            else:
                chosen = options.shape or (tiles.SHAPES if device.is_cuda else TINY[:1])
                table = None if output is None else output.with_name(f"{output.stem}-tiles.csv")
                tiles.measure(bench, chosen, table)
    if output is not None and bench.rows:
        print(f"wrote {output}: {len(bench.rows)} rows")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
