"""Kernels with one mistake each, to see that it is found."""

# mypy: allow-untyped-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reads_beyond(values_ptr, out_ptr, count):
    """The last element of the last program is one too far."""
    at = tl.program_id(0) * 16 + tl.arange(0, 16)
    tl.store(out_ptr + at, tl.load(values_ptr + at + 1))


@triton.jit
def leaves_one_out(values_ptr, out_ptr, count):
    """The first element is never written."""
    at = tl.program_id(0) * 16 + tl.arange(0, 16)
    tl.store(out_ptr + at, tl.load(values_ptr + at), mask=at > 0)


@triton.jit
def needs_an_order(values_ptr, out_ptr, count):
    """Every program writes its number to the first elements: the last one wins."""
    at = tl.arange(0, 64)
    tl.store(out_ptr + at, tl.load(values_ptr + at) * 0.0 + tl.program_id(0))
