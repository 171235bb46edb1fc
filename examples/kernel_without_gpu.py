"""How to test a Triton kernel without a GPU: one small kernel, five mistakes, and which technique finds which.

Run ``python examples/kernel_without_gpu.py`` on Linux. Nothing of ltloss is imported: copy what you need.
docs/testing-kernels.md says what each technique finds, and what it cannot.
"""

# ruff: noqa: E402 - Triton reads its variable where a kernel is decorated; a forked process waits for OpenMP's threads
from __future__ import annotations

import ctypes
import json
import math
import mmap
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

COMPILING = "--compile" in sys.argv
os.environ |= {"TRITON_INTERPRET": "0" if COMPILING else "1", "OMP_NUM_THREADS": "1"}

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter

SPLITS, SCALE, TOLERANCE = 3, 0.3, 1e-6
MISTAKES = ("none", "no mask", "row left out", "needs an order", "type changes", "too few warps")
ORDERS = {"reverse": lambda count: np.arange(count)[::-1], "random": np.random.default_rng(0).permutation}
TECHNIQUES = ("values", "guards", "poison", *ORDERS)


@triton.jit
def sums_kernel(
    x_ptr, w_ptr, sums_ptr, rows, classes, width, scale,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, WIDTH: tl.constexpr, MISTAKE: tl.constexpr
):  # fmt: skip
    """sums[split, i] = Σ exp(scale·x_i · w_c) over the classes of a split: x (rows, width), w (classes, width)."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    split, splits = tl.program_id(1), tl.num_programs(1)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    x = tl.load(x_ptr + row[:, None] * width + column[None, :], mask=inside, other=0.0)
    x = (x.to(tl.float32) * scale).to(x_ptr.dtype.element_ty)
    total = 0.0 if MISTAKE == "type changes" else tl.zeros([ROWS], tl.float32)  # Python would not mind
    for start in range(split * CLASSES, classes, splits * CLASSES):
        one = start + tl.arange(0, CLASSES)
        mask = (one[:, None] < classes) & (column[None, :] < width)
        if MISTAKE == "no mask":  # what is read beyond the last class is dropped below: no value is wrong
            mask = column[None, :] < width
        w = tl.load(w_ptr + one[:, None] * width + column[None, :], mask=mask, other=0.0)
        total += tl.sum(tl.where(one[None, :] < classes, tl.exp(tl.dot(x, tl.trans(w))), 0.0), 1)
    out, mask = sums_ptr + split * rows + row, row < rows
    if MISTAKE == "needs an order":  # right where the splits of a row run one after the other
        out = sums_ptr + row
        if split > 0:
            total += tl.load(out, mask=mask, other=0.0)
    if MISTAKE == "row left out":  # right where the memory holds the result of the step before
        mask = mask & (row > 0)
    tl.store(out, total, mask=mask)


def sums(x: Tensor, w: Tensor, mistake: str) -> Tensor:
    """Σ_c exp(scale·x_i · w_c), (N,), without the N×C logits."""
    tile, warps = ((128, 64), 1) if mistake == "too few warps" else ((64, 64), 4)
    parts = torch.empty(SPLITS, len(x))
    given = (x, w, parts, len(x), len(w), x.shape[1], SCALE)
    sums_kernel[triton.cdiv(len(x), tile[0]), SPLITS](*given, *tile, 32, mistake, num_warps=warps)
    return parts[0] if mistake == "needs an order" else parts.sum(0)


@contextmanager
def gpu_arithmetic():
    """The interpreter multiplies the bits of bfloat16 numbers, and cuts bits off where a GPU rounds: not in here."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    usual = builder.cast_impl

    def numbers(block):
        single = (block.data.astype(np.uint32) << 16).view(np.float32)
        return (single if block.dtype.scalar == tl.bfloat16 else block.data).astype(np.float64)

    def create_dot(self, a, b, start, *precision):
        return handle((numbers(a) @ numbers(b) + start.data).astype(start.data.dtype), start.dtype.scalar)

    def cast_impl(self, source, kind):
        if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return usual(self, source, kind)
        return handle(torch.tensor(source.data).bfloat16().view(torch.uint16).numpy(), kind.scalar)

    with mock.patch.multiple(builder, create_dot=create_dot, cast_impl=cast_impl):
        yield


def guarded(shape, dtype: torch.dtype, side: str) -> Tensor:
    """Memory that begins or ends at a page without access: a signal ends the process that goes beyond."""
    size, page = math.prod(shape) * dtype.itemsize, mmap.PAGESIZE
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for forbidden in (address, address + page + room):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(forbidden), page, 0) == 0
    offset = page + (room - size if side == "end" else 0)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset).view(dtype).view(shape)


@contextmanager
def grid_order(order):
    """Within the block the programs of a launch run in the order of a permutation: ``order(how many)``."""
    builder, turns = interpreter.interpreter_builder, {}
    usual = builder.set_grid_idx

    def set_grid_idx(*index):
        sizes = tuple(builder.grid_dim)
        if index == (0, 0, 0):  # a launch begins
            turns["now"] = order(math.prod(sizes))
        usual(*map(int, np.unravel_index(turns["now"][np.ravel_multi_index(index, sizes)], sizes)))

    with mock.patch.object(builder, "set_grid_idx", set_grid_idx):
        yield


def problem() -> list[Tensor]:
    """Sizes that no tile divides."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 19, generator=generator).bfloat16() for size in (70, 200)]


def wrong(mistake: str, technique: str = "values", side: str = "") -> bool:
    """Whether a run under watch differs from the formula in float64."""
    given = x, w = problem()
    parts = [((x.float() * SCALE).bfloat16().double() @ one.double().T).exp().sum(1) for one in w.split(64)]
    held = torch.stack([sum(parts[split::SPLITS]) for split in range(SPLITS)]).float()  # by the step before,
    memory = torch.full_like(held, torch.nan) if technique == "poison" else held  # in memory that is given out again
    if side:
        given = [guarded(one.shape, one.dtype, side).copy_(one) for one in given]
    empty = (lambda *shape: guarded(shape, torch.float32, side)) if side else (lambda *shape: memory)
    order = ORDERS.get(technique, np.arange)
    with grid_order(order), np.errstate(all="ignore"), mock.patch.object(torch, "empty", empty):
        return not (sums(*given, mistake) / sum(parts) - 1).abs().max() <= TOLERANCE


def guards_find(mistake: str) -> bool:
    """Whether a process of its own is wrong, or a guard ends it."""
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=lambda at=at: sys.exit(wrong(mistake, side=at))) for at in ("start", "end")]
    for run in runs:
        run.start()
        run.join()
    return any(run.exitcode for run in runs)


def compiled(mistake: str) -> dict:
    """The same call, with every launch compiled instead of done: what is refused, or what the assembler says."""
    kernels, usual = [], triton.JITFunction.run

    def run(self, *args, warmup, **options):
        kernels.append(usual(self, *args, warmup=True, **options))

    driver = mock.Mock()  # what Triton asks before it compiles
    driver.get_current_device.return_value, driver.get_current_target.return_value = 0, GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(driver)
    try:
        with mock.patch.object(triton.JITFunction, "run", run):
            sums(*problem(), mistake)
    except triton.CompilationError as refused:
        return {"refused": str(refused).strip().splitlines()[-1]}
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # in Triton's wheel
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernels[0].asm["cubin"])
        file.flush()
        commands = ([tools / "cuobjdump", "-res-usage", file.name], [tools / "nvdisasm", "-c", file.name])
        usage, code = (subprocess.run(one, capture_output=True, text=True, check=True).stdout for one in commands)
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "products": sorted(set(re.findall(r"HGMMA[\w.]*", code)))}


def main() -> None:
    """Print which technique finds which mistake."""
    if COMPILING:
        print(json.dumps({mistake: compiled(mistake) for mistake in MISTAKES}))
        return
    print("the right kernel, in the interpreter as it is:", "wrong" if wrong("none") else "right")
    print(f"{'':14}", *(f"{name:>9}" for name in (*TECHNIQUES, "compiler", "assembler")))
    done = subprocess.run([sys.executable, __file__, "--compile"], stdout=subprocess.PIPE, text=True, check=True)
    for mistake, launch in json.loads(done.stdout).items():
        with gpu_arithmetic():
            found = [guards_find(mistake) if one == "guards" else wrong(mistake, one) for one in TECHNIQUES]
        found += ["refused" in launch, launch.get("stack", 0) > 0]
        print(f"{mistake:14}", *(f"{'found' if one else '-':>9}" for one in found), "", launch)


if __name__ == "__main__":
    main()
