"""``python -m benchmarks.step``: time and memory of the whole training step, optimizer included.

The rows go to ``results/step-cpu.csv``, from which ``python -m benchmarks.pictures`` makes tables and a figure. Ratios
are to the loss with torch's optimizer of the same family, from medians of the same round. Memory is that of the whole
process, torch included.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from benchmarks.peers import Shape, errors_of
from benchmarks.step.cases import CASES, Case
from benchmarks.step.checks import check
from benchmarks.step.measure import MIB, Row, Work, compared, idle_bytes, in_turns, judged, row
from benchmarks.step.picture import SERIES
from benchmarks.timing import RESULTS, read_rows, stamp, write_rows

SHAPE = Shape(256, 1_000_000, 128)
OVER_CLASSES = (10_000, 30_000, 100_000, 300_000)  # and the million of SHAPE
LINEAR = [Shape(256, classes, 64) for classes in (1_000_000, 3_000_000, 10_000_000)]
LINEAR_WITHIN = 0.15  # the most that a time per class may differ from their median, as a fraction of it
# The most GiB with which ten million classes must train.
TEN_MILLION = {"PrototypeSGD": 6.0, "PrototypeAdagrad, bfloat16": 3.0, "PrototypeAdagrad, float8": 3.0}


def checked(cases: Sequence[Case]) -> dict[str, str]:
    """The error of each case by name; raises if one is wrong. Peers that are not installed are left out."""
    return errors_of({case.name: partial(check, case) for case in cases}, "'ltloss[bench]'")


def whole_step(shape: Shape, names: Sequence[str], rounds: int, steps: int, idle: int) -> list[Row]:
    """Rows of every optimizer and every peer, with ratios to torch's optimizer of the family."""
    works = [Work(name, shape) for name in names]
    found = in_turns(works, rounds, steps)
    rows = [row("whole step", work, one, idle) for work, one in zip(works, found, strict=True)]
    compared(works, found, rows)
    return rows


def over_classes(shapes: Sequence[Shape], rounds: int, steps: int, idle: int) -> list[Row]:
    """Rows over the number of classes, for the figure."""
    works = [Work(name, shape) for shape in shapes for name in SERIES]
    found = in_turns(works, rounds, steps)
    return [row("over classes", work, one, idle) for work, one in zip(works, found, strict=True)]


def many_classes(shapes: Sequence[Shape], rounds: int, steps: int, idle: int) -> list[Row]:
    """Rows up to ten million classes, with the goals: memory within its limit, and time linear in the classes."""
    works = [Work(name, shape) for name in TEN_MILLION for shape in shapes]
    found = in_turns(works, rounds, steps)
    rows = [row("many classes", work, one, idle) for work, one in zip(works, found, strict=True)]
    for name, most_gib in TEN_MILLION.items():
        own = [entry for entry in rows if entry["optimizer"] == name]
        if any("ns_per_class" not in entry for entry in own):
            continue
        per_class = [float(entry["ns_per_class"]) for entry in own]
        middle = statistics.median(per_class)
        off = max(abs(one - middle) / middle for one in per_class)
        gib = float(own[-1]["peak_mib"]) / 1024
        own[-1]["goal"] = f"{judged('GiB', gib, most_gib)}; {judged('off linear', off, LINEAR_WITHIN)}"
    return rows


_OPTIONAL = {"time_ratio": "time {} x", "memory_ratio": "memory {} x", "goal": "{}", "note": "({})"}


def _show(rows: Sequence[Row]) -> None:
    for entry in rows:
        shape = str(Shape(entry["N"], entry["C"], entry["D"]))
        parts = [f"{entry['case']:13} {shape:16} {entry['optimizer']:42}"]
        if "median_ms" in entry:
            parts.append(f"{float(entry['median_ms']):9.1f} ms  peak {entry['peak_mib']:>5} MiB")
        parts += [text.format(entry[name]) for name, text in _OPTIONAL.items() if entry.get(name)]
        print("  ".join(parts), flush=True)


PARTS = ("whole step", "over classes", "many classes")


def measured(part: str, names: Sequence[str], rounds: int, steps: int, idle: int) -> list[Row]:
    """The rows of one part."""
    if part == "whole step":
        return whole_step(SHAPE, names, rounds, steps, idle)
    if part == "over classes":
        return over_classes([Shape(SHAPE.n, classes, SHAPE.d) for classes in OVER_CLASSES], rounds, steps, idle)
    return many_classes(LINEAR, max(1, rounds // 2), max(3, steps // 2), idle)


def main() -> None:
    """Check, measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=PARTS, help="one part; rows of the others stay as they are")
    parser.add_argument("--rounds", type=int, default=2, help="fresh processes of each case (default 2)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each process (default 5)")
    parser.add_argument("--output", type=Path, default=RESULTS / "step-cpu.csv", help="CSV to write")
    arguments = parser.parse_args()
    common, errors, idle = stamp(), checked(list(CASES.values())), idle_bytes()
    print(f"{common['device']}, {common['threads']} threads, load {common['load']}, idle process {idle / MIB:.0f} MiB")
    before: list[Row] = list(read_rows(arguments.output)) if arguments.only else []
    rows = {part: [one for one in before if one["case"] == part] for part in PARTS}
    for part in (arguments.only,) if arguments.only else PARTS:
        found = measured(part, list(errors), arguments.rounds, arguments.steps, idle)
        rows[part] = [{**common, **entry, "relative_error": errors[entry["optimizer"]]} for entry in found]
        _show(rows[part])
        write_rows([*chain(*rows.values())], arguments.output)  # after each part: the whole takes most of an hour
    print(f"wrote {arguments.output}; `python -m benchmarks.pictures` shows it")


if __name__ == "__main__":
    main()
