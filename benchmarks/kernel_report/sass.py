"""Reads what ptxas made of a kernel: registers, instructions, and the cheapest walk through one tile's epilogue.

Works on the text of ``cuobjdump --dump-resource-usage`` and ``nvdisasm -c``; needs neither a GPU nor Triton.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Matrix instructions: mma.sync (HMMA), wgmma (HGMMA), tcgen05.mma (UTCHMMA; TF32 also UTCMMA in some assemblers).
MATRIX = re.compile(r"HMMA|HGMMA|UTC\w*MMA")
FLOAT32 = re.compile(r"(FFMA|FMUL|FADD)(2|32I)?(\.|$)")
EXPONENTIAL = "MUFU.EX2"
MAXIMUM = "FMNMX"

_LABEL = re.compile(r"^(\.L_\w+|[\w$.]+):$")
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P[T\d]+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*);"
)
_TARGET = re.compile(r"`\(([^)]+)\)")
_CONDITION = re.compile(r"!?U?P\d")


class Resources(NamedTuple):
    """Per thread: registers and stack bytes (a stack is where spilled registers go). Per block: static shared bytes."""

    registers: int
    stack: int
    shared: int


def parse_resources(text: str, kernel: str) -> Resources:
    """Find the line of ``kernel`` in the output of ``cuobjdump --dump-resource-usage``.

    Raises:
        ValueError: no such function, or a line without the three numbers.
    """
    _, found, after = text.partition(f"Function {kernel}:")
    values = dict(re.findall(r"\b(REG|STACK|SHARED):(\d+)", after.partition("Function ")[0]))
    if not found or len(values) < 3:
        raise ValueError(f"no resource usage of {kernel!r} in cuobjdump's output:\n{text[-500:]}")
    return Resources(int(values["REG"]), int(values["STACK"]), int(values["SHARED"]))


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; ``target`` is the label that a branch names."""

    opcode: str
    guarded: bool = False
    target: str | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor core executes it."""
        return MATRIX.match(self.opcode) is not None


@dataclass
class Listing:
    """The instructions of a kernel in order, and where each label points (an index into them)."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def count(self, pattern: str) -> int:
        """How many opcodes the regular expression matches from their beginning."""
        expression = re.compile(pattern)
        return sum(expression.match(one.opcode) is not None for one in self.instructions)

    def matrix_opcodes(self) -> list[str]:
        """The different matrix instructions, for instance ``HGMMA.64x128x16.F32.BF16``."""
        return sorted({one.opcode for one in self.instructions if one.is_matrix})


def parse_listing(text: str, kernel: str) -> Listing:
    """Read the section of ``kernel`` from the output of ``nvdisasm -c``.

    Raises:
        ValueError: the section is missing or holds no instruction.
    """
    listing = Listing([], {})
    inside = False
    for line in text.splitlines():
        if line.split(maxsplit=1)[:1] == [".section"]:  # not .sectionflags
            inside = f".text.{kernel}," in line
        elif not inside:
            continue
        elif label := _LABEL.match(line):
            listing.labels[label.group(1)] = len(listing.instructions)
        elif found := _INSTRUCTION.match(line):
            listing.instructions.append(_instruction(found))
    if not listing.instructions:
        raise ValueError(f"no instructions of {kernel!r} in nvdisasm's output")
    return listing


def _instruction(found: re.Match[str]) -> Instruction:
    opcode, rest = found["opcode"], found["rest"]
    target = _TARGET.search(rest) if opcode.startswith(("BRA", "CALL")) else None
    if target and opcode.startswith("CALL") and not target.group(1).startswith(".L_"):
        target = None  # another function, which comes back; to a label of this one, CALL is a jump
    before = rest[: target.start()] if target else ""
    # Blackwell writes `BRA.U UP0, target`: the condition is an operand. BRA.DIV leaves only where a warp diverges.
    conditional = bool(_CONDITION.search(before)) or opcode.startswith("BRA.DIV")
    return Instruction(opcode, found["guard"] is not None or conditional, target.group(1) if target else None)


class _Segment(NamedTuple):
    """Straight code, which ends at a branch, before a label, or with a matrix instruction."""

    opcodes: list[str]
    next: list[int | None]  # segments that may follow; None is the end of the program
    is_matrix: bool
    counted: int


def _segments(listing: Listing, counted: str) -> list[_Segment]:
    starts = {0, *listing.labels.values()}
    for index, one in enumerate(listing.instructions):
        if one.is_matrix or one.opcode.startswith(("BRA", "CALL", "EXIT", "RET")):
            starts.add(index + 1)
    bounds = sorted(start for start in starts if start < len(listing.instructions))
    number = {start: position for position, start in enumerate(bounds)}
    segments = []
    for start, stop in zip(bounds, [*bounds[1:], len(listing.instructions)], strict=True):
        opcodes = [one.opcode for one in listing.instructions[start:stop]]
        followers = list(_followers(listing, stop - 1, number))
        is_matrix = listing.instructions[stop - 1].is_matrix
        segments.append(_Segment(opcodes, followers, is_matrix, times_executed(Counter(opcodes), counted)))
    return segments


def _followers(listing: Listing, last: int, number: dict[int, int]) -> Iterator[int | None]:
    one = listing.instructions[last]
    leaves = one.opcode.startswith(("EXIT", "RET"))
    if leaves:
        yield None
    if one.target is not None and (target := number.get(listing.labels.get(one.target, -1))) is not None:
        yield target
    if (one.guarded or not (leaves or one.target)) and (after := number.get(last + 1)) is not None:
        yield after


def cheapest_epilogue(listing: Listing, times: int, counted: str = EXPONENTIAL) -> Counter[str] | None:
    """What one thread executes between two tiles' products when it takes no branch that it can avoid.

    Of all walks from a matrix instruction to the next one (or to the end of the program) that execute at least
    ``times`` instructions whose opcode starts with ``counted``, the one with the fewest instructions: so the branch for
    tiles that hold a label is left out, and so is another copy of the epilogue for another case. A kernel without
    matrix instructions is walked from its entry to its end.

    Returns:
        How often each opcode is executed, or None where no walk executes that many of the counted instructions.
    """
    segments = _segments(listing, counted)
    after_product = sorted({n for one in segments if one.is_matrix for n in one.next if n is not None})
    # Dijkstra's algorithm over (segment, counted instructions so far, capped at what is asked for).
    queue = [(0, start, 0) for start in after_product or [0]]
    came_from: dict[tuple[int, int], tuple[int, int] | None] = {(start, 0): None for _, start, _ in queue}
    cost = dict.fromkeys(came_from, 0)
    while queue:
        spent, index, seen = heapq.heappop(queue)
        if spent > cost[index, seen]:
            continue
        segment = segments[index]
        reached = min(times, seen + segment.counted)
        ends = segment.is_matrix or None in segment.next
        if ends and reached == times:
            return _executed(segments, came_from, (index, seen))
        if segment.is_matrix:
            continue
        for follower in segment.next:
            state = (-1 if follower is None else follower, reached)
            total = spent + len(segment.opcodes)
            if follower is not None and total < cost.get(state, total + 1):
                cost[state], came_from[state] = total, (index, seen)
                heapq.heappush(queue, (total, *state))
    return None


def _executed(
    segments: Sequence[_Segment],
    came_from: dict[tuple[int, int], tuple[int, int] | None],
    last: tuple[int, int],
) -> Counter[str]:
    executed: Counter[str] = Counter()
    state: tuple[int, int] | None = last
    while state is not None:
        executed.update(op for op in segments[state[0]].opcodes if not MATRIX.match(op))
        state = came_from[state]
    return executed


def times_executed(executed: Counter[str], counted: str) -> int:
    """How many opcodes start with ``counted``; Blackwell's maximum of three (FMNMX3) is two maxima."""
    return sum(times * (1 + op.startswith("FMNMX3")) for op, times in executed.items() if op.startswith(counted))


def float32_operations(executed: Counter[str]) -> int:
    """Float32 additions, multiplications and fused ones; Blackwell's packed forms (FFMA2) do two."""
    total = 0
    for opcode, times in executed.items():
        if found := FLOAT32.match(opcode):
            total += times * (2 if found.group(2) == "2" else 1)
    return total
