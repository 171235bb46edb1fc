"""The kernel report as tables: one for the terminal, two for the documentation, between marks in its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence.pages import markdown_table, renewed

Row = Mapping[str, Any]
WIDTHS = (128, 256, 512, 1024, 4096)  # the D of the predictions

# What most training steps run; the CSV has everything.
DOCUMENTED = (
    "cosine_logsumexp bf16, fixed",
    "cosine_logsumexp bf16, online",
    "cosine_logsumexp fp16, fixed",
    "gradient_tile bf16, plain",
    "gradient_tile fp16, plain",
    "nearest_prototype bf16",
    "nearest_prototype fp32 tf32",
    "best_tile bf16, every tile",
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
    "serial_D512": "serial",
    "overlapped_D512": "overlapped",
}


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """The columns that matter most, a header first; predictions are those of D = 512."""
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


def _percent(row: Row, width: int) -> str:
    low, high = (round(100 * float(row[f"{bound}_D{width}"])) for bound in ("serial", "overlapped"))
    return f"{low} %" if low == high else f"{low}-{high} %"


def _predictions(rows: Sequence[Row]) -> list[list[str]]:
    """Serial to overlapped share of the matrix peak at every D, of the rows that have a prediction."""
    lines = [["kernel", "arch", *(f"D = {width}" for width in WIDTHS), "L2 B/clk"]]
    for row in rows:
        if row.get(f"serial_D{WIDTHS[0]}"):
            shares = [_percent(row, width) for width in WIDTHS]
            lines.append([row["kernel"], row["architecture"], *shares, row["operand_bytes_per_clock"]])
    return lines


def with_tables(page: str, rows: Sequence[Row]) -> str:
    """The page with its two tables, which stand between ``<!-- NAME -->`` and ``<!-- end of NAME -->``, renewed."""
    shown = [row for row in rows if row["kernel"] in DOCUMENTED]
    for name, lines in (("table", _cells(shown)), ("prediction", _predictions(shown))):
        page = renewed(page, name, markdown_table(lines))
    return page
