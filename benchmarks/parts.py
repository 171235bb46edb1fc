"""A benchmark in parts: each is measured, printed and written by itself, so that one that stops keeps what it has."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.timing import read_rows, write_rows

Row = dict[str, Any]
Parts = Mapping[str, Callable[[], Iterable[Row]]]  # by the ``case`` of their rows


def add_arguments(parser: argparse.ArgumentParser, names: Iterable[str], output: Path) -> None:
    """Add the options of every benchmark in parts: which one to measure, and where its rows go."""
    parser.add_argument("--only", choices=[*names], help="one part; rows of the others stay as they are")
    parser.add_argument("--output", type=Path, default=output, help=f"CSV to write (default {output.name})")


def measure(parts: Parts, given: argparse.Namespace, common: Row, title: str, optional: Mapping[str, str]) -> None:
    """Measure all parts, or one of them, and write the rows after each.

    Args:
        parts: what measures the rows, by their ``case``.
        given: the options of :func:`add_arguments`. With ``only``, the file's rows of the other parts stay.
        common: what every row begins with.
        title, optional: the column that names a row where it is printed, and other columns with their words.
    """
    only, output = given.only, given.output
    before = read_rows(output) if only else []
    rows: dict[str, Sequence[Row]] = {name: [row for row in before if row["case"] == name] for name in parts}
    for name in [only] if only else parts:
        print(f"measuring {name} ...", flush=True)
        rows[name] = [{**common, **row} for row in parts[name]()]
        for row in rows[name]:
            print(_line(row, row[title], optional), flush=True)
        write_rows([*chain(*rows.values())], output)
    print(f"wrote {output}; `python -m benchmarks.pictures` shows it")


def _line(row: Row, name: str, optional: Mapping[str, str]) -> str:
    """A row in one line: its case, shape, ``name`` and median, then each of ``optional`` that it has, in its words."""
    parts = [f"{row['case']:18} {row['N']}x{row['C']}x{row['D']:<8} {name:42}"]
    if "median_ms" in row:
        parts.append(f"{float(row['median_ms']):9.1f} ms")
    return "  ".join([*parts, *(text.format(row[column]) for column, text in optional.items() if row.get(column))])
