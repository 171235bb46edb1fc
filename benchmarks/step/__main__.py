"""``python -m benchmarks.step``: time and memory of the whole training step, optimizer included.

The rows go to ``results/step-cpu.csv``, from which ``python -m benchmarks.pictures`` makes tables and a figure. Ratios
are to the loss with torch's optimizer of the same family, from medians of the same round. Memory is that of the whole
process, torch included.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain

from benchmarks import parts
from benchmarks.peers import Shape, errors_of
from benchmarks.step.cases import CASES, Case
from benchmarks.step.checks import check
from benchmarks.step.measure import MIB, Row, Work, compared, idle_bytes, in_turns, row
from benchmarks.step.picture import SERIES
from benchmarks.timing import RESULTS, judged, stamp

SHAPE = Shape(256, 1_000_000, 128)
OVER_CLASSES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
LINEAR = [Shape(256, classes, 64) for classes in (1_000_000, 3_000_000, 10_000_000)]
LINEAR_WITHIN = 0.15  # the most that a time per class may differ from their median, as a fraction of it
# The most GiB with which ten million classes must train.
TEN_MILLION = {"PrototypeSGD": 6.0, "PrototypeAdagrad, bfloat16": 3.0, "PrototypeAdagrad, float8": 3.0}


def checked(cases: Sequence[Case]) -> dict[str, str]:
    """The error of each case by name; raises if one is wrong. Peers that are not installed are left out."""
    return errors_of({case.name: partial(check, case) for case in cases}, "'ltloss[bench]'")


def whole_step(
    shape: Shape, names: Sequence[str], rounds: int, steps: int, idle: int, part: str = "whole step"
) -> list[Row]:
    """Rows of optimizers and peers at one shape, with ratios to torch's optimizer of the family."""
    works = [Work(name, shape) for name in names]
    found = in_turns(works, rounds, steps)
    rows = [row(part, work, one, idle) for work, one in zip(works, found, strict=True)]
    compared(works, found, rows)
    return rows


def over_classes(shapes: Sequence[Shape], rounds: int, steps: int, idle: int) -> list[Row]:
    """Rows over the number of classes, for the README: picture and table. The goals are those of the whole step."""
    rows = [whole_step(shape, list(SERIES), rounds, steps, idle, "over classes") for shape in shapes]
    return [{**one, "goal": ""} for one in chain(*rows)]


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


_OPTIONAL = {
    "peak_mib": "peak {} MiB",
    "time_ratio": "time {} x",
    "memory_ratio": "memory {} x",
    "goal": "{}",
    "note": "({})",
}


def parts_of(errors: Mapping[str, str], rounds: int, steps: int, idle: int) -> parts.Parts:
    """What measures each part; ``errors`` are those of the cases, by name."""
    figure = [Shape(SHAPE.n, classes, SHAPE.d) for classes in OVER_CLASSES]

    def checked_rows(rows: Sequence[Row]) -> list[Row]:
        return [{**row, "relative_error": errors[row["optimizer"]]} for row in rows]

    return {
        "whole step": lambda: checked_rows(whole_step(SHAPE, list(errors), rounds, steps, idle)),
        "over classes": lambda: checked_rows(over_classes(figure, rounds, steps, idle)),
        "many classes": lambda: checked_rows(many_classes(LINEAR, max(1, rounds // 2), max(3, steps // 2), idle)),
    }


def main() -> None:
    """Check, measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=2, help="fresh processes of each case (default 2)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each process (default 5)")
    parts.add_arguments(parser, parts_of({}, 1, 1, 0), RESULTS / "step-cpu.csv")
    given = parser.parse_args()
    common, errors, idle = stamp(), checked(list(CASES.values())), idle_bytes()
    print(f"{common['device']}, {common['threads']} threads, load {common['load']}, idle process {idle / MIB:.0f} MiB")
    measured = parts_of(errors, given.rounds, given.steps, idle)
    parts.measure(measured, given, common, "optimizer", _OPTIONAL)


if __name__ == "__main__":
    main()
