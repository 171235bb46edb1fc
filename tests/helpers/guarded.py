"""Interpreted kernels under watch: memory that ends at a page without access, poison in it, other orders of the grid.

:func:`watched` runs one case in a process of its own, which an access out of bounds ends.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from ltloss_kernels.config import chunking, tile_table
from ltloss_kernels.config.precision import float32_products
from torch import Tensor

import ltloss
from benchmarks.kernel_report.launches import written_down
from benchmarks.kernel_report.scenarios import loss_step, prototype_update
from helpers import faulty_kernels, world
from helpers.interpreter import quick_interpreter
from helpers.kernel_problems import kernel_problem, tiny_tiles
from ltloss import functional
from ltloss.float8 import FLOAT8
from ltloss.margins import Margin

Side = Literal["start", "end"]
Order = Literal["reversed", "shuffled"]

_PAGE = mmap.PAGESIZE
_ALIGNMENT = 16  # of every allocation; what lies between the end of a tensor and the page is poisoned
_POISON = 0xFF  # NaN in every floating dtype, -1 in integers
_empty = torch.empty


def _forbid(address: int) -> None:
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address), _PAGE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(shape: Sequence[int], dtype: torch.dtype, side: Side) -> Tensor:
    """A poisoned tensor that begins or ends at a page without access."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return _empty(shape, dtype=dtype)
    padded = -(-size // _ALIGNMENT) * _ALIGNMENT
    room = -(-padded // _PAGE) * _PAGE
    region = mmap.mmap(-1, room + 2 * _PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    torch.frombuffer(region, dtype=torch.uint8, count=room, offset=_PAGE).fill_(_POISON)
    for page in (address, address + _PAGE + room):
        _forbid(page)
    offset = _PAGE + (room - padded if side == "end" else 0)
    return torch.frombuffer(region, dtype=torch.uint8, count=size, offset=offset).view(dtype).view(tuple(shape))


def _copied(tensor: Tensor, side: Side) -> Tensor:
    """The same numbers in guarded memory, with the strides that they had."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = guarded((extent,), tensor.dtype, side)
    return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


@contextmanager
def guards(side: Side) -> Iterator[None]:
    """Within the block ``torch.empty`` and its like give guarded memory."""

    def empty(*size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return guarded(tuple(shape), dtype or torch.get_default_dtype(), side)

    def new_empty(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        return empty(*size, dtype=dtype or self.dtype)

    def empty_like(tensor: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return empty(*tensor.shape, dtype=dtype or tensor.dtype)

    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "empty_like", empty_like),
        mock.patch.object(torch.Tensor, "new_empty", new_empty),
    ):
        yield


@contextmanager
def grid_order(order: Order) -> Iterator[None]:
    """Within the block the programs of a kernel run in another order."""
    from triton.runtime.interpreter import interpreter_builder

    generator = np.random.default_rng(0)
    usual, turns = interpreter_builder.set_grid_idx, {}

    def set_grid_idx(x: int, y: int, z: int) -> None:
        grid = interpreter_builder.grid_dim
        count = math.prod(grid)
        number = (x * grid[1] + y) * grid[2] + z
        if number == 0:  # a launch begins
            turns["now"] = np.arange(count)[::-1] if order == "reversed" else generator.permutation(count)
        rest, z = divmod(int(turns["now"][number]), grid[2])
        usual(*divmod(rest, grid[1]), z)

    with mock.patch.object(interpreter_builder, "set_grid_idx", set_grid_idx):
        yield


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def differing(run: Callable[..., Sequence[Tensor]], *given: Tensor) -> list[str]:
    """Where a run under watch differs from the run without, in any bit."""
    expected = [_bits(one) for one in run(*given)]
    ways: list[tuple[str, Side, Order]] = [
        ("memory that ends at a guard, programs in reverse", "end", "reversed"),
        ("memory that begins at a guard, programs in random order", "start", "shuffled"),
    ]
    different = []
    for name, side, order in ways:
        inputs = [_copied(one, side) for one in given]
        with grid_order(order), guards(side):
            found = [_bits(one) for one in run(*inputs)]
        if not all(map(torch.equal, found, expected)):
            different.append(name)
    return different


def _loss(
    dtypes: tuple[torch.dtype, torch.dtype],
    workspace: int = 256 << 20,
    sizes: tuple[int, int, int] = (37, 70, 19),
    precision: str = "highest",
    keep: bool = False,
    **options: Any,
) -> Callable[[], list[str]]:
    """Forward and backward; vectors among the options lie in guarded memory too."""
    names = [name for name, value in options.items() if isinstance(value, Tensor)]

    def run(features: Tensor, prototypes: Tensor, labels: Tensor, *vectors: Tensor) -> Sequence[Tensor]:
        leaves = [one.requires_grad_() for one in (features, prototypes) if one.dtype != FLOAT8]
        with (
            ltloss.use_workspace(workspace, keep_exponentials=keep),
            float32_products(precision),
            mock.patch.object(chunking, "_LEAST_CLASSES", 16),
        ):
            chosen = {**options, **dict(zip(names, vectors, strict=True))}
            loss = functional.margin_cross_entropy(features, prototypes, labels, **chosen)
            return loss, *torch.autograd.grad(loss, leaves, torch.ones_like(loss))

    given = kernel_problem(*sizes, dtypes=dtypes)
    return lambda: differing(run, *(one.detach() for one in given), *(options[name] for name in names))


def _update(
    rule: str, storage: tuple[torch.dtype, str], sizes: tuple[int, int, int] = (37, 70, 20), workspace: int = 256 << 20
) -> Callable[[], list[str]]:
    """A step that moves prototypes and their state, all in guarded memory; the dtype is that of both, if it can be."""
    dtype, rounding = storage
    given = kernel_problem(*sizes, dtypes=(torch.float32, dtype))
    of_state = torch.float32 if dtype == FLOAT8 else dtype
    usual = prototype_update(rule, given.prototypes, of_state, rounding, seed=3)

    def run(features: Tensor, prototypes: Tensor, *kept: Tensor) -> Sequence[Tensor]:
        # The input is moved: each run has its own.
        weight, *state = (torch.empty_like(one).copy_(one) for one in (prototypes, *kept))
        compensation = None if usual.compensation is None else state.pop()
        update = usual._replace(
            weight=weight,
            state=tuple(state),
            compensation=compensation,
            lr=torch.empty_like(rate).copy_(rate),
            step=torch.empty_like(rate).fill_(2.0),
            skipped=torch.empty_like(usual.skipped).fill_(0),
            exponent=None if usual.exponent is None else torch.empty_like(usual.exponent).fill_(3),
        )
        with mock.patch.object(chunking, "_LEAST_CLASSES", 16):
            loss_step(features, weight, Margin(0.5), update=update, limit=workspace)
        others = (one for one in (compensation, update.exponent) if one is not None)
        return weight, *state, *others, update.step, update.skipped

    rate = torch.tensor(0.1)
    state = [torch.full_like(one, 0.25) for one in usual.state]
    compensation = [] if usual.compensation is None else [torch.full_like(usual.compensation, 1e-3)]
    return lambda: differing(run, given.features, given.prototypes, *state, *compensation)


def _searches_of_float8() -> list[str]:
    def run(features: Tensor, prototypes: Tensor, rows: Tensor) -> Sequence[Tensor]:
        found = (functional.nearest_prototype(prototypes, chosen) for chosen in (None, rows))
        return [*itertools.chain(*found), *functional.top_k(features, prototypes, 5)]

    given = kernel_problem(37, 70, 19, dtypes=(torch.float16, FLOAT8))
    return differing(run, given.features, given.prototypes, torch.tensor([3, 69, 0]))


def _searches() -> list[str]:
    def run(features: Tensor, prototypes: Tensor, rows: Tensor) -> Sequence[Tensor]:
        leaf = prototypes.requires_grad_()
        values = [functional.min_angle_regularizer(leaf, classes=chosen) for chosen in (None, rows)]
        best = functional.top_k(features, leaf.detach(), 5)
        return *values, *torch.autograd.grad(values[0] + values[1], leaf), *best

    given = kernel_problem(37, 70, 19)
    rows = torch.tensor([3, 69, *[3] * 9, 0])  # class 3 and its nearest have several chunks of the gradient
    return differing(run, given.features, given.prototypes, rows)


def _faulty(kernel: str) -> Callable[[], list[str]]:
    """A kernel that reads one element too far, one that leaves one out, and one whose programs need their order."""

    def run(values: Tensor) -> Sequence[Tensor]:
        out = torch.empty(len(values), dtype=values.dtype)
        getattr(faulty_kernels, kernel)[(4,)](values, out, len(values))
        return (out,)

    return lambda: differing(run, torch.arange(64.0))


def _without_copy_engine(case: Callable[[], list[str]]) -> Callable[[], list[str]]:
    """Blocks by addresses, 16 bytes at a time."""

    def run() -> list[str]:
        with mock.patch.object(tile_table, "has_copy_engine", return_value=False):
            return case()

    return run


def cases() -> dict[str, Callable[[], list[str]]]:
    """By name, what is run under watch."""
    single, half = torch.float32, torch.float16
    vector = torch.linspace(0.1, 0.5, 70)
    everything: dict[str, Any] = {"log_prior": vector, "class_weight": vector, "cosine_margin": vector}
    everything |= {"label_smoothing": 0.1, "angle_multiplier": 1.1}
    return {
        "float32": _loss((single, single), angular_margin=vector),
        "float16": _loss((half, half), angular_margin=vector),
        "mixed": _loss((half, single), angular_margin=0.3),
        "everything": _loss((single, single), **everything),
        "length kept": _loss((single, single), normalize_features=False, angular_margin=0.3),
        "running maximum": _loss((single, single), scale=512.0),
        "several slabs": _loss((half, half), 1, angular_margin=vector, reduction="none"),
        # Rows of whole 16 bytes are read in place. Then the forward finds lengths in its tiles (TF32, float16), and the
        # product for the prototypes ends in their projection (float32).
        "lengths in tiles": _loss((single, single), sizes=(37, 70, 20), precision="high", **everything),
        "lengths in tiles, float16": _loss((half, half), sizes=(37, 70, 24), angular_margin=vector),
        "projecting product": _loss((single, single), sizes=(37, 70, 20), angular_margin=vector),
        "projecting product, several slabs": _loss((single, single), 1, (37, 70, 20), reduction="none"),
        "kept": _loss((single, single), keep=True, angular_margin=vector),
        "kept, running maximum, several slabs": _loss((half, half), 1 << 14, keep=True, **everything),
        "kept by addresses": _without_copy_engine(_loss((half, half), keep=True, **everything)),
        "kept, lengths in tiles": _loss((half, half), sizes=(37, 70, 24), keep=True, angular_margin=vector),
        "searches": _searches,
        "searches of float8": _searches_of_float8,
        "by addresses": _without_copy_engine(_loss((half, half), 1, angular_margin=vector)),
        "searches by addresses": _without_copy_engine(_searches),
        "update in the product": _update("adamw", (single, "")),
        "update in the product, rounded, slabs": _update("nesterov", (torch.bfloat16, "stochastic"), workspace=1),
        "update in the projection": _update("adamw", (torch.bfloat16, "kahan"), (37, 70, 19)),
        "float8": _loss((half, FLOAT8), angular_margin=vector),
        "float8, several slabs": _loss((single, FLOAT8), 1, sizes=(37, 70, 20), angular_margin=vector),
        "update of float8, slabs": _update("adamw", (FLOAT8, "stochastic"), (37, 70, 19), 1),
        "update of whole rows, slabs": _update("adagrad", (torch.bfloat16, "stochastic"), (37, 70, 19), 1),
        **{name: _faulty(name) for name in ("reads_beyond", "leaves_one_out", "needs_an_order")},
    }


def watched(name: str) -> tuple[int, str]:
    """Run a case in a process of its own; its exit code, negative for a signal, and where it differed or its error."""
    context = world.processes()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(name, there), daemon=True)
    process.start()
    there.close()
    said = "nothing, in 300 seconds"
    with suppress(EOFError):  # a signal ended it
        if here.poll(300):
            said = here.recv()
        else:
            process.kill()
    process.join()
    return process.exitcode, said


def _main(name: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    try:
        with quick_interpreter(), written_down(), tiny_tiles(), ltloss.use_backend("triton"), np.errstate(all="ignore"):
            pipe.send("; ".join(cases()[name]()))
    except BaseException:
        pipe.send(traceback.format_exc()[-2000:])
        raise
