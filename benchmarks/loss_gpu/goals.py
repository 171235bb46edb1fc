"""The goals for Hopper, and whether rows of stage 2 meet them. The table in docs/performance-kernels.md shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.evidence.pages import markdown_table
from benchmarks.peers import Shape
from benchmarks.timing import judged

__all__ = ["GOALS", "Goal", "judge", "table"]

Row = dict[str, Any]


class Goal(NamedTuple):
    """A bound on a column of our row; a share is to be at least that, anything else at most.

    ``to``: the provider whose value it is divided by. ``column`` "": no row has it.
    """

    phase: str
    shape: Shape
    column: str
    bound: float
    stretch: float | None = None
    dtype: str = "bfloat16"
    to: str = ""

    @property
    def what(self) -> str:
        """What is bounded, in a word or two."""
        return (_RATIO if self.to else _UNIT)[self.column]

    def judged(self, value: float) -> str:
        """Whether it is met, in words with the numbers."""
        return judged(self.what, value, self.bound, at_least=self.column == "share_of_P")

    def shown(self) -> str:
        """The bound, and in brackets what would be better still, for the documentation."""
        percent = self.column == "share_of_P"
        bound, *more = (f"{100 * one:g} %" if percent else f"{one:g}" for one in (self.bound, self.stretch) if one)
        times = "× " if self.to or not self.column else ""
        return f"{bound} {times}{self.what.removeprefix('share ')}" + "".join(f" ({one})" for one in more)


_UNIT = {"share_of_P": "share of P", "extra_mib": "MiB extra", "median_ms": "ms", "": "the least bytes"}
_RATIO = {"median_ms": "time", "extra_mib": "memory"}
_NAMES = {"nearest": "nearest prototype: ", "whole step": "step with the update inside, beside torch's fused AdamW: "}
_LARGE, _MANY, _WIDE = Shape(8192, 131_072, 512), Shape(4096, 1_000_000, 512), Shape(8192, 131_072, 4096)
_FEW = Shape(256, 1_000_000, 512)

GOALS = (
    *(Goal("forward", shape, "share_of_P", 0.80, 0.90) for shape in (_LARGE, _MANY)),
    Goal("forward", _WIDE, "share_of_P", 0.87, 0.92),
    *(Goal("backward", shape, "share_of_P", 0.75, 0.85) for shape in (_LARGE, _MANY)),
    Goal("backward", _WIDE, "share_of_P", 0.85, 0.90),
    *(Goal("forward", shape, "extra_mib", most) for shape, most in ((_LARGE, 8), (_MANY, 32), (_WIDE, 8))),
    *(Goal("backward", shape, "extra_mib", 256) for shape in (_LARGE, _MANY, _WIDE)),
    Goal("forward", Shape(8192, 131_072, 128), "share_of_P", 0.35),
    Goal("forward", Shape(8192, 131_072, 256), "share_of_P", 0.60),
    Goal("step", Shape(4096, 131_072, 1024), "median_ms", 8.0),
    Goal("nearest", Shape(100_000, 100_000, 512), "median_ms", 9.3, 8.1),
    # Bound by memory: counted by benchmarks.bytes_moved, in multiples of the least bytes.
    *(Goal("forward", Shape(n, 1_000_000, 512), "", 1.0) for n in (64, 256, 512)),
    *(Goal("backward", Shape(n, 1_000_000, 512), "", 1.6) for n in (64, 256, 512)),
    *(
        Goal("whole step", _FEW, column, most, None, dtype, "loss + AdamW(fused)")
        for column, most in (("median_ms", 0.5), ("extra_mib", 0.4))
        for dtype in ("float32", "bfloat16")  # of the prototypes
    ),
)


def _row_of(goal: Goal, provider: str, rows: Sequence[Row]) -> Row | None:
    """The first row that measured what the goal bounds."""
    wanted: Row = {"provider": provider, "phase": goal.phase, "dtype": goal.dtype}
    wanted |= {"N": goal.shape.n, "C": goal.shape.c, "D": goal.shape.d}
    for row in rows:
        if row.get(goal.column) and all(row.get(name) == value for name, value in wanted.items()):
            return row
    return None


def judge(rows: Sequence[Row]) -> list[str]:
    """Write into ``goal`` of each row what it meets, with the numbers; return a line for each goal."""
    lines: list[str] = []
    found: dict[int, list[str]] = {}  # by row
    for goal in GOALS:
        ours, unit = _row_of(goal, "ltloss", rows), 1.0
        if goal.to and ours is not None:
            theirs = _row_of(goal, goal.to, rows)
            unit = float(theirs[goal.column]) if theirs is not None else 0.0
        text = f"{goal.what} not measured"
        if ours is not None and unit:
            text = goal.judged(float(ours[goal.column]) / unit)
            own = found.setdefault(id(ours), [])
            own.append(text)
            ours["goal"] = "; ".join(own)
        if goal.column:
            dtype = f", {goal.dtype} prototypes" if goal.to else ""
            lines.append(f"goal: {goal.phase} at {goal.shape}{dtype}: {text}")
    return lines


def table() -> str:
    """All goals for the documentation, in brackets what would be better still; a line for each shape."""
    lines = []
    for shape in dict.fromkeys(goal.shape for goal in GOALS):
        line = [f"({shape.n}, {shape.c}, {shape.d})".replace("1000000", "1M")]
        for phases in (["forward"], ["backward"], ["step", *_NAMES]):
            here = [goal for goal in GOALS if goal.shape == shape and goal.phase in phases]
            names = dict.fromkeys(_NAMES.get(goal.phase, "") for goal in here)
            line.append("".join(names) + ", ".join(dict.fromkeys(goal.shown() for goal in here)))
        lines.append(line)
    return markdown_table([["(N, C, D)", "forward", "backward", "both, or what else"], *lines])
