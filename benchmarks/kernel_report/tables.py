"""The kernel report as tables: one for the terminal, one for the documentation, between marks in its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence.pages import markdown_table, renewed

Row = Mapping[str, Any]

# What most training steps run; the CSV has everything.
DOCUMENTED = (
    "cosine_logsumexp bf16, fixed",
    "cosine_logsumexp bf16, online",
    "cosine_logsumexp fp16, fixed",
    "gradient_tile bf16, fixed",
    "gradient_tile fp16, fixed",
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
    """The columns that matter most, a header first."""
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
    """The page with its table, which stands between ``<!-- table -->`` and ``<!-- end of table -->``, renewed."""
    return renewed(page, "table", markdown_table(_cells([row for row in rows if row["kernel"] in DOCUMENTED])))
