"""The device's random numbers, and rows that are written in float8 with them, by themselves."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl
from ltloss_kernels.device.prototype_update import keep, random_numbers, scaled_down


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


@triton.jit(do_not_specialize=["first", "seed", "step"])
def float8_kernel(
    rows_ptr,
    out_ptr,
    exponent_ptr,
    classes,
    width,
    first,
    seed,
    step,
    ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Float32 rows (classes, width) of the classes from ``first`` on, as they are kept: float8, and exponents int8."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = rows < classes
    mask = inside[:, None] & (columns < width)[None, :]
    at = rows[:, None] * width + columns[None, :]
    exponent, scaled = scaled_down(tl.load(rows_ptr + at, mask=mask, other=0.0), mask)
    tl.store(exponent_ptr + rows, exponent.to(tl.int8), mask=inside)
    counter = 1 + (rows.to(tl.int64) + first) * tl.cdiv(width, 16)
    keep(out_ptr + at, scaled, mask, counter, seed, step, 0, ROUNDING)
