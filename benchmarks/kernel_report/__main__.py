"""``python -m benchmarks.kernel_report``: resources and instructions of every kernel that is launched, without a GPU.

The launches are recorded (``benchmarks/kernel_report/record.py``), compiled ahead of time for sm_80, sm_90 and sm_100,
and disassembled with the tools in Triton's wheel. The table has registers, spills, shared memory and resident blocks,
the matrix instructions, and how many instructions the epilogue takes per accumulator element. It is written to
``results/kernel_report.csv``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.pages import markdown_table, renewed
from benchmarks.kernel_report.record import recorded_kernels, recorded_layouts
from benchmarks.kernel_report.report import ARCHITECTURES, Row, missing_tools, report, tool_versions
from benchmarks.timing import RESULTS, stamp, write_rows

# What most training steps run; the CSV has everything.
DOCUMENTED = (
    "cosine_logsumexp bf16, fixed",
    "cosine_logsumexp bf16, online",
    "cosine_logsumexp fp16, fixed",
    "gradient_tile bf16, fixed",
    "gradient_tile fp16, fixed",
    "cosine_logsumexp bf16, fixed, kept",
    "gradient_tile bf16, fixed, kept",
    "prototype_gradient bf16, N = 300, adamw",
    "projection bf16, adamw",
    "nearest_prototype bf16, all",
    "nearest_prototype tf32, all",
    "best_tile bf16, top 5",
)

_SHOWN = {
    "tile": "tile",
    "warps": "warps",
    "registers": "regs",
    "stack_bytes": "stack",
    "shared_bytes": "shared",
    "blocks_per_sm": "blocks",
    "exponentials_per_element": "ex2",
    "maxima_per_element": "max",
    "float32_per_element": "f32",
    "epilogue_per_element": "instr",
}


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """The most important columns, a header first."""
    lines = [["kernel", "arch", *_SHOWN.values()]]
    for row in rows:
        values = [row["error"]] if row["error"] else [str(row.get(name, "")) for name in _SHOWN]
        lines.append([row["kernel"], row["architecture"], *values])
    return lines


def plain_table(rows: Sequence[Row]) -> str:
    """Every row, for the terminal."""
    return "\n".join(
        f"{line[0]:44} {line[1]:7}" + "".join(f"{value:>12}" for value in line[2:]) for line in _cells(rows)
    )


def with_table(page: str, rows: Sequence[Row]) -> str:
    """The page with a new table between ``<!-- table -->`` and ``<!-- end of table -->``."""
    return renewed(page, "table", markdown_table(_cells([row for row in rows if row["kernel"] in DOCUMENTED])))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, write the CSV; 1 if a kernel does not compile."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", default="", metavar="REGEX", help="only kernels whose name matches")
    parser.add_argument("--architecture", action="append", choices=list(ARCHITECTURES), help="(default: all)")
    parser.add_argument("--layouts", action="store_true", help="many layouts of the inputs instead; not disassembled")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=RESULTS / "kernel_report.csv", help="CSV to write")
    options = parser.parse_args(arguments)
    if why := missing_tools():
        print(f"no kernel report: {why}", file=sys.stderr)
        return 2
    architectures = options.architecture or list(ARCHITECTURES)
    recorded = recorded_layouts if options.layouts else recorded_kernels
    rows = report(architectures, options.kernel, options.processes, recorded)
    print(plain_table(rows))
    who = {name: value for name, value in stamp().items() if name in ("date", "commit")}
    write_rows([{**row, **who, **tool_versions()} for row in rows], options.output)
    failed = [row for row in rows if row["error"]]
    print(f"wrote {options.output}: {len(rows)} kernels, {len(failed)} of them do not compile")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
