"""``python -m benchmarks.evidence.toponyms``: accuracy, time and memory of examples/toponyms.py with each of its heads.

Trainings run one after the other, each in its own process with one thread. ``--all`` takes the 150,091 places instead
of the 27,695 towns; with all classes in each step this takes hours. Rows go to ``results/evidence_toponyms.csv`` as
soon as they are done, and are not trained again. `make pictures` shows them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence.pages import markdown_table
from benchmarks.timing import RESULTS, add_row, fresh_processes, read_rows, stamp
from examples import toponyms

TABLE = RESULTS / "evidence_toponyms.csv"
_FIGURES = ("all", "top-5", "10 names or more", "4 to 9", "fewer than 4", "training seconds", "peak memory, MiB")


def trained(arguments: Sequence[str]) -> dict[str, Any]:
    """The results of the example with these arguments, and the machine and versions."""
    import torch

    torch.set_num_threads(1)
    found = toponyms.run(toponyms.parser().parse_args(arguments))
    return {**{name: f"{value:.1f}" for name, value in found.items()}, **stamp()}


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A line for each training."""
    lines = [["classes", "head", "of the classes", *_FIGURES]]
    for row in rows:
        sampled = row["head"] in ("uniform", "hard")
        cells = [f"{float(row[name]):,.0f}" if name in _FIGURES[-2:] else row[name] for name in _FIGURES]
        lines.append([f"{float(row['classes']):,.0f}", row["head"], row["rate"] if sampled else "all", *cells])
    return markdown_table(lines)


def main() -> None:
    """Train what the table lacks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--head", action="append", choices=tuple(toponyms.HEADS), help="which (default: every head)")
    parser.add_argument("--all", action="store_true", help="150,091 places")
    parser.add_argument("--rate", default="0.1", help="share of the classes of uniform and hard (default: 0.1)")
    parser.add_argument("--limit", help="only so many of the places")
    options = parser.parse_args()
    rows = list(read_rows(TABLE))
    for head in options.head or toponyms.HEADS:
        places = f"{options.limit or ''} {'places' if options.all else 'towns'}".strip()
        key = {"places": places, "head": head, "rate": options.rate}
        if any(all(row[name] == text for name, text in key.items()) for row in rows):
            continue
        arguments = ["--head", head, "--rate", options.rate, *(["--all"] if options.all else [])]
        arguments += ["--limit", options.limit] if options.limit else []
        with fresh_processes(1, {"OMP_NUM_THREADS": "1"}) as pool:
            add_row({**key, **pool.submit(trained, arguments).result()}, rows, TABLE)


if __name__ == "__main__":
    main()
