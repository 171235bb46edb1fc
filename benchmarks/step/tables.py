"""Tables for the documentation from the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence.pages import markdown_table, renewed

_HEAD = ["", "time / torch", "/ torch, fused", "peak MiB", "memory / torch", "goals"]


# The cases in the README -> their titles there.
_HEADLINE = {
    "PrototypeAdamW": "**ltloss, [prototypes that move inside the backward](docs/optim.md)**",
    "PrototypeAdamW, bfloat16": "the same in bfloat16: saves memory, not time",
    "torch AdamW": "ltloss and `torch.optim.AdamW`",
    "linear_cross_entropy + torch AdamW": "`F.linear_cross_entropy` and AdamW (no margin, no normalisation)",
    "pytorch-metric-learning + torch AdamW": "pytorch-metric-learning `ArcFaceLoss` and AdamW",
    "dense + torch AdamW": "the dense formula and AdamW",
}


def headline_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Time and memory of ours and of the peers at the most classes of the picture, one line each."""
    pictured = sorted((one for one in rows if one["case"] == "over classes"), key=lambda one: int(one["C"]))
    found = {one["optimizer"]: one for one in pictured}  # the last of each
    ours = found["PrototypeAdamW"]
    at = "{N} samples, {C:,} classes, D = {D}, {threads} cores of {device}".format(**{**ours, "C": int(ours["C"])})
    lines = [[f"whole training step with AdamW: {at}", "seconds", "times the first", "process, GiB"]]
    for name, called in _HEADLINE.items():
        one = found[name]
        ratio = "" if one is ours else f"{float(one['time_ratio']) / float(ours['time_ratio']):.1f}"
        lines.append([called, f"{float(one['median_ms']) / 1e3:.1f}", ratio, f"{float(one['peak_mib']) / 1024:.1f}"])
    return markdown_table(lines)


def with_tables(page: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page about performance with both tables of steps renewed."""
    return renewed(renewed(page, "whole step", whole_step_table(rows)), "many classes", many_classes_table(rows))


def whole_step_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every optimizer and peer, with ratios to torch's optimizer of the family."""
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
            lines.append([one["optimizer"], f"{int(one['C']):,}", *(str(one.get(cell, "")) for cell in cells)])
    return markdown_table(lines)
