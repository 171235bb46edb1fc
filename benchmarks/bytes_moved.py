"""``python -m benchmarks.bytes_moved``: bytes that a step moves between a GPU's memory and its cache, without a GPU.

The launchers run on a CPU, and every launch is recorded with its operands instead of done. Each launch then goes
through a model of the second-level cache: it touches all its operands once, from the first byte to the last, at the
same pace. Lines that a kernel marks leave the cache first, then the least recently used ones. A written line goes to
memory when it leaves. The result is a count of the bytes that move if programs at work at one time share what they
read. It is not a measurement.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.kernel_report.record import as_on_a_gpu
from benchmarks.kernel_report.scenarios import loss_step, prototype_update
from ltloss.margins import Margin

CACHE = 50 << 20  # of an H100
_LINE = 32 << 10  # bytes of a line in the model; small beside every operand that matters
_STEPS = 64  # parts into which a launch divides each operand


class Operand(NamedTuple):
    """Consecutive bytes that a launch reads or writes."""

    start: int
    size: int
    written: bool
    streamed: bool = False  # marked to leave the cache first


class Traffic:
    """A write-back cache of ``capacity`` bytes; ``moved`` counts the bytes between it and the memory."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.moved = capacity // _LINE, 0
        self._lines: OrderedDict[int, bool] = OrderedDict()  # line -> whether it is newer than the memory

    def launch(self, operands: list[Operand]) -> None:
        """Touch all operands of a launch, a part of each in turn."""
        for step in range(_STEPS):
            for start, size, written, streamed in operands:
                first, end = (start + size * at // _STEPS for at in (step, step + 1))
                for line in range(first // _LINE, -(-end // _LINE)):
                    self._touch(line, written, streamed)

    def _touch(self, line: int, written: bool, streamed: bool) -> None:
        known = self._lines.pop(line, None)
        if known is None and not written:
            self.moved += _LINE
        self._lines[line] = written or bool(known)
        if streamed:
            self._lines.move_to_end(line, last=False)
        if len(self._lines) > self.capacity:
            self.moved += _LINE * self._lines.popitem(last=False)[1]

    def flush(self) -> None:
        """Write every newer line back to the memory, and empty the cache."""
        self.moved += _LINE * sum(self._lines.values())
        self._lines.clear()


def _bytes_of(given: Any) -> tuple[int, int] | None:
    """Address and bytes of a tensor or of a descriptor's matrix, gaps between rows included; None for other values."""
    matrix = getattr(given, "base", given)
    if not isinstance(matrix, Tensor) or matrix.numel() == 0:
        return None
    extent = 1 + sum((size - 1) * stride for size, stride in zip(matrix.shape, matrix.stride(), strict=True))
    return matrix.data_ptr(), extent * matrix.element_size()


def _section(kernel: Any, name: str) -> set[str]:
    """The arguments of a kernel between the comment "# name" in its signature and the next comment."""
    section = kernel.src.partition(f"# {name}\n")[2].partition("#")[0]
    return set(re.findall(r"^\s*(\w+),", section, re.MULTILINE))


@contextmanager
def _taken_down(traffic: Traffic) -> Iterator[None]:
    """Within the block, launches and library products go through ``traffic`` instead of a device."""
    from ltloss_kernels import cosine_logsumexp_gradients, launching
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, **constants: Any) -> None:
        updated, operands = _section(self, "updated"), []
        written = _section(self, "outputs") | updated
        if constants.get("NORMS"):  # the tiles then compute this argument, which is an input otherwise
            written.add("logit_scale_log2_ptr")
        for name, given in zip(self.arg_names, args, strict=False):
            if (found := _bytes_of(given)) is None:
                continue
            start, size = found
            if (self.__name__, name) == ("sample_kernel", "prototypes_ptr"):  # only the rows of the labels are read
                size = size // len(given) * len(args[self.arg_names.index("labels_ptr")])
            if (self.__name__, name) == ("gradient_tile_kernel", "kept"):  # a slab's columns, as if contiguous
                whole = getattr(given, "base", given).shape[1]
                first, count = (args[self.arg_names.index(size_name)] for size_name in ("first_class", "classes"))
                start, size = start + size * first // whole, size * count // whole
            moved = bool(constants.get("RULE")) and name == "grad_prototypes_ptr"  # an update: these are the prototypes
            if name in updated:
                operands.append(Operand(start, size, written=False, streamed=True))
            operands.append(Operand(start, size, name in written, name in updated or moved))
        traffic.launch(operands)

    def product(target: Tensor, left: Tensor, right: Tensor, *, overwrite: bool) -> None:
        parts = [(left, False), (right, False), *([] if overwrite else [(target, False)]), (target, True)]
        traffic.launch([Operand(*_bytes_of(one), written) for one, written in parts])  # type: ignore[misc]

    launching.forget()
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(cosine_logsumexp_gradients, "multiply_add", product),
        as_on_a_gpu(90),
    ):
        yield
    launching.forget()


class Moved(NamedTuple):
    """Bytes that a pass moves, and the least that it could move: each operand and each result once."""

    bytes: int
    least: int

    @property
    def ratio(self) -> float:
        """Bytes over the least; 1 is ideal."""
        return self.bytes / self.least


def step(
    n: int,
    c: int,
    d: int,
    x: torch.dtype = torch.bfloat16,
    w: torch.dtype = torch.bfloat16,
    rule: str | None = None,
    keep: bool = False,
) -> tuple[Moved, Moved]:
    """Bytes of forward and backward at (n, c, d), with features of dtype ``x`` and prototypes of ``w``.

    ``rule``: the backward updates the prototypes by this rule, with float32 state, instead of writing their gradient.
    ``keep``: exponentials are kept; they do not count in the least.
    """
    features, prototypes = torch.empty(n, d, dtype=x), torch.empty(c, d, dtype=w)
    update = None if rule is None else prototype_update(rule, prototypes)
    traffic = Traffic(CACHE)
    counted: list[int] = []

    def count() -> None:
        traffic.flush()
        counted.append(traffic.moved - sum(counted))

    with _taken_down(traffic):
        loss_step(features, prototypes, Margin(0.5), between=count, update=update, keep=keep)
        count()
    least = features.nbytes + prototypes.nbytes + n * torch.int64.itemsize
    state = 0 if update is None else sum(one.nbytes for one in update.state)
    return Moved(counted[0], least), Moved(counted[1], least + features.nbytes + prototypes.nbytes + 2 * state)


@contextmanager
def as_for_many() -> Iterator[None]:
    """Within the block, few samples use the kernels for many."""
    from ltloss_kernels.config import tile_table

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(tile_table, "norms_in_tiles", return_value=False))
        stack.enter_context(mock.patch.object(tile_table, "prototype_gradient_tile", return_value=None))
        yield


@contextmanager
def slabs_of_the_cache() -> Iterator[None]:
    """Within the block, slabs of few samples stay in the second-level cache."""
    from ltloss_kernels.config import choices

    with choices.trying("slabs of the cache"):
        yield


def main() -> int:
    """Print a table for few samples and a million classes."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    print("prototypes     N  as            forward  x least   backward  x least   (GB; C = 1,000,000, D = 512)")
    for w in (torch.bfloat16, torch.float32):
        for n in (64, 256, 512):
            for name, way in (("many", as_for_many), ("few", nullcontext), ("in cache", slabs_of_the_cache)):
                with way():
                    forward, backward = step(n, 10**6, 512, w=w)
                print(
                    f"{str(w)[6:]:10} {n:5}  {name:10} {forward.bytes / 1e9:10.2f} {forward.ratio:8.2f} "
                    f"{backward.bytes / 1e9:10.2f} {backward.ratio:8.2f}"
                )
    print("\nexponentials kept (GB; C = 1,000,000, D = 512, bfloat16 prototypes)")
    print("    N   forward    kept   backward    kept")
    for n in (256, 512, 4096):
        pairs = zip(*(step(n, 10**6, 512, keep=keep) for keep in (False, True)), strict=True)
        print(f"{n:5}" + "".join(f"{usual.bytes / 1e9:10.2f} {kept.bytes / 1e9:7.2f}" for usual, kept in pairs))
    print("\nthe whole step, prototypes moved in the backward, float32 state, slabs of the cache (N = 256)")
    print("prototypes  rule       GB   x least")
    for w, rule in itertools.product((torch.bfloat16, torch.float32), ("sgd", "adamw")):
        with slabs_of_the_cache():
            whole = Moved(*map(sum, zip(*step(256, 10**6, 512, w=w, rule=rule), strict=True)))
        print(f"{str(w)[6:]:10}  {rule:6} {whole.bytes / 1e9:7.2f} {whole.ratio:8.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
