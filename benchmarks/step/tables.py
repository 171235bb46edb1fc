"""The rows as tables of the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence.pages import markdown_table

_HEAD = ["", "time / today's", "/ torch, fused", "peak MiB", "memory / today's", "goals"]


def whole_step_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every optimizer and peer beside today's of its family."""
    lines = [_HEAD]
    for one in rows:
        if one["case"] == "whole step":
            cells = ("time_ratio", "time_ratio_to_fused", "peak_mib", "memory_ratio")
            last = one.get("goal", "") if "median_ms" in one else one["note"]
            lines.append([one["optimizer"], *(str(one.get(cell, "")) for cell in cells), last])
    return markdown_table(lines)


def many_classes_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Time and memory up to ten million classes."""
    lines = [["", "C", "ns a class", "peak MiB", "loss", "goals"]]
    for one in rows:
        if one["case"] == "many classes":
            cells = ("ns_per_class", "peak_mib", "note", "goal")
            lines.append([one["optimizer"], f"{one['C']:,}", *(str(one.get(cell, "")) for cell in cells)])
    return markdown_table(lines)
