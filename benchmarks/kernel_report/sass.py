"""Read the machine code of a kernel: registers, instructions, and the shortest path through one tile's epilogue.

It works on the text of ``cuobjdump --dump-resource-usage`` and ``nvdisasm -c``, and needs neither a GPU nor Triton.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
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
    """Resources of a kernel."""

    registers: int  # per thread
    stack: int  # bytes per thread; spilled registers go there
    shared: int  # bytes of static shared memory per block


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


def left_from_registers(text: str) -> int:
    """How many products on Hopper take their left operand from registers: they stand where a descriptor would."""
    return len(re.findall(r"HGMMA\S* R\d+, R\d+, gdesc", text))


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

    @property
    def leaves(self) -> bool:
        """Whether the program can end here."""
        return self.opcode.startswith(("EXIT", "RET"))


@dataclass
class Listing:
    """The instructions of a kernel in order, and where each label points (an index into them)."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def count(self, pattern: str) -> int:
        """How many opcodes begin with a match of the regular expression."""
        expression = re.compile(pattern)
        return sum(expression.match(one.opcode) is not None for one in self.instructions)

    def matrix_opcodes(self) -> list[str]:
        """The different matrix instructions, for instance ``HGMMA.64x128x16.F32.BF16``."""
        return sorted({one.opcode for one in self.instructions if one.is_matrix})

    def followers(self, index: int) -> list[int]:
        """The indices of the instructions that can follow one."""
        one = self.instructions[index]
        found = [self.labels[one.target]] if one.target in self.labels else []
        if one.guarded or not (one.leaves or one.target):
            found.append(index + 1)
        return [after for after in found if after < len(self.instructions)]


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
        target = None  # a call of another function returns; CALL to a label of this function is a jump
    before = rest[: target.start()] if target else ""
    # Blackwell writes `BRA.U UP0, target`: the condition is an operand. BRA.DIV leaves only where a warp diverges.
    conditional = bool(_CONDITION.search(before)) or opcode.startswith("BRA.DIV")
    return Instruction(opcode, found["guard"] is not None or conditional, target.group(1) if target else None)


def _stretches(listing: Listing) -> dict[int, int]:
    """Start -> end of each straight stretch of code: it ends after a branch or matrix instruction, or at a label."""
    code = listing.instructions
    branches = ("BRA", "CALL", "EXIT", "RET")
    after = {index + 1 for index, one in enumerate(code) if one.is_matrix or one.opcode.startswith(branches)}
    starts = sorted(start for start in {0, *listing.labels.values(), *after} if start < len(code))
    return dict(zip(starts, [*starts[1:], len(code)], strict=True))


def cheapest_epilogue(listing: Listing, times: int, counted: str = EXPONENTIAL) -> Counter[str] | None:
    """The instructions that one thread executes between two tiles' products on the shortest path.

    Of all paths from a matrix instruction to the next one (or to the end of the program) that execute at least
    ``times`` instructions whose opcode starts with ``counted``, it is the one with the fewest instructions. So the
    branch for tiles that hold a label is not counted, nor a second copy of the epilogue for another case. In a kernel
    without matrix instructions the path goes from its entry to its end.

    Returns:
        How often each opcode is executed, or None if no path executes that many of the counted instructions.
    """
    code, stretches = listing.instructions, _stretches(listing)
    after_product = {after for index, one in enumerate(code) if one.is_matrix for after in listing.followers(index)}
    # Dijkstra's algorithm over (instruction, counted ones before it, capped at what is asked for).
    queue = [(0, start, 0) for start in sorted(after_product) or [0]]
    walks: dict[tuple[int, int], tuple[int, Counter[str]]] = {(start, 0): (0, Counter()) for _, start, _ in queue}
    while queue:
        spent, start, seen = heapq.heappop(queue)
        cost, walk = walks[start, seen]
        if spent > cost:
            continue
        stretch = code[start : stretches[start]]
        last, total = stretch[-1], spent + len(stretch)
        executed = Counter(one.opcode for one in stretch if not one.is_matrix)
        reached = min(times, seen + times_executed(executed, counted))
        if reached == times and (last.is_matrix or last.leaves):
            return walk + executed
        for after in [] if last.is_matrix else listing.followers(stretches[start] - 1):
            if (after, reached) not in walks or total < walks[after, reached][0]:
                walks[after, reached] = total, walk + executed
                heapq.heappush(queue, (total, after, reached))
    return None


def times_executed(executed: Counter[str], counted: str) -> int:
    """How many executed opcodes start with ``counted``; Blackwell's maximum of three (FMNMX3) counts as two."""
    return sum(times * (1 + op.startswith("FMNMX3")) for op, times in executed.items() if op.startswith(counted))


def float32_operations(executed: Counter[str]) -> int:
    """The float32 additions, multiplications and fused ones executed; Blackwell's packed forms (FFMA2) count as two."""
    total = 0
    for opcode, times in executed.items():
        if found := FLOAT32.match(opcode):
            total += times * (2 if found.group(2) == "2" else 1)
    return total
