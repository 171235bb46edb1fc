"""The device's random numbers, written to memory."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl
from ltloss_kernels.device.prototype_update import random_numbers


@triton.jit(do_not_specialize=["first", "seed", "step"])
def random_kernel(
    out_ptr,
    classes,
    width,
    first,
    seed,
    step,
    STREAM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Numbers (classes, width) int32 of the classes from ``first`` on; a tile of ROWS by COLUMNS per program."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS
    columns = column + tl.arange(0, COLUMNS)
    counter = 1 + (rows.to(tl.int64) + first) * tl.cdiv(width, 16) + column // 16
    numbers = random_numbers(counter, seed, step, STREAM, COLUMNS)
    mask = (rows < classes)[:, None] & (columns < width)[None, :]
    tl.store(out_ptr + rows[:, None] * width + columns[None, :], numbers, mask=mask)
