"""Rounding of float32 to bfloat16 or float8 so that nothing is lost on average.

The random bits are Philox4x64-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011), a function of
(seed, step, stream, class, column). So they are the same for every number of slabs, splits and ranks, and any device
can make them again.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ltloss._validation import check_choice
from ltloss.float8 import FLOAT8

__all__ = ["COLUMNS_PER_BLOCK", "Rounding", "check_dtypes", "philox", "random_bits", "round_stochastically"]

Rounding = Literal["stochastic", "kahan", "nearest"]

# A block of Philox4x64 is 256 bits: one number of 16 bits for each of so many columns.
COLUMNS_PER_BLOCK = 16

_MULTIPLIERS = np.array([0xD2E7470EE14C6C93, 0xCA5A826395121157], np.uint64)
_KEY_STEPS = np.array([0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B], np.uint64)
_SMALLEST_NORMAL = 2.0**-6  # of float8 e4m3, which keeps 3 of float32's 23 bits
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def _product(a: np.uint64, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """High and low 64 bits of a·b."""
    a_high, a_low, b_high, b_low = a >> _HALF, a & _LOW, b >> _HALF, b & _LOW
    middle = a_high * b_low + (a_low * b_low >> _HALF)
    carried = a_low * b_high + (middle & _LOW)
    return a_high * b_high + (middle >> _HALF) + (carried >> _HALF), a * b


def philox(counter: np.ndarray, key: tuple[int, int], stream: int = 0) -> np.ndarray:
    """Blocks (K, 4) of 64 random bits for the counters (K,), ten rounds each."""
    c0, c1 = counter.astype(np.uint64), np.zeros(counter.shape, np.uint64)
    c2, c3 = np.full(counter.shape, stream, np.uint64), np.zeros(counter.shape, np.uint64)
    keys = np.array(key, np.uint64)
    with np.errstate(over="ignore"):
        for _ in range(10):
            (high0, low0), (high1, low1) = _product(_MULTIPLIERS[0], c0), _product(_MULTIPLIERS[1], c2)
            c0, c1, c2, c3 = high1 ^ c1 ^ keys[0], low1, high0 ^ c3 ^ keys[1], low0
            keys = keys + _KEY_STEPS
    return np.stack([c0, c1, c2, c3], axis=-1)


def random_bits(classes: range | np.ndarray, width: int, seed: int, step: int, stream: int) -> Tensor:
    """16 random bits for every class and column: (K, width) int16, uniform over all of its values.

    Args:
        classes: global numbers of the classes, consecutive as a range, or any as an array (K,).
        width: D.
        seed, step: the key.
        stream: tells apart what is rounded in the same step.
    """
    blocks = -(-width // COLUMNS_PER_BLOCK)
    if isinstance(classes, range):  # numpy's own generator counts up before it makes a block
        start = [classes.start * blocks, 0, stream, 0]
        generator = np.random.Philox(key=np.array([seed, step], np.uint64), counter=np.array(start, np.uint64))
        drawn = generator.random_raw(len(classes) * blocks * 4)
    else:
        first = classes.astype(np.int64) * blocks + 1
        drawn = philox((first[:, None] + np.arange(blocks)).ravel(), (seed, step), stream)
    words = torch.from_numpy(np.ascontiguousarray(drawn).view(np.int16))
    return words.view(len(classes), blocks * COLUMNS_PER_BLOCK)[:, :width]


def round_stochastically(values: Tensor, bits: Tensor, out: Tensor) -> None:
    """Round float32 ``values`` to bfloat16 or float8 ``out``: up with the probability of the part that is cut off.

    A uniform number below one unit of the last place that is kept is added, and the rest is cut off: the mean over all
    ``bits`` (int16, of the same shape) is the value itself; in float8 (|values| <= 448) to 2^-17 of a unit. ``values``
    is used up.
    """
    integers = values.view(torch.int32)
    if out.dtype == FLOAT8:
        # Below its smallest normal number the unit is that of [2^-6, 2^-5): such values are moved there and back.
        # sign(max(2^-6 - |x|, 0)) tells them; torch's comparisons take three times as long on a CPU.
        moved = values.abs().sub_(_SMALLEST_NORMAL).neg_().clamp_min_(0.0).sign_().mul_(_SMALLEST_NORMAL)
        moved.copysign_(values)
        values.add_(moved)
        integers.add_(bits.to(torch.int32), alpha=16).add_((1 << 19) + 8).bitwise_and_(-1 << 20)
        out.copy_(values.sub_(moved))
        return
    integers.add_(bits).add_(1 << 15).bitwise_and_(-1 << 16)
    out.copy_(values)


def check_dtypes(weight: torch.dtype, state: torch.dtype | None, rounding: Rounding | None) -> None:
    """Raise ValueError unless prototypes and state may be kept so, and written with that rounding."""
    if weight not in (torch.float32, torch.bfloat16, FLOAT8, torch.float64):
        raise ValueError(f"the prototypes must be float32, bfloat16 or float8_e4m3fn; got {weight}")
    if state not in (None, torch.float32, torch.bfloat16, weight) or state == FLOAT8:
        raise ValueError(f"state_dtype must be torch.float32 or torch.bfloat16; got {state}")
    if rounding is not None:
        check_choice("rounding", rounding, get_args(Rounding))
    if weight in (torch.bfloat16, FLOAT8) and rounding is None:
        kahan = "'kahan' (2 bytes an entry more) " if weight == torch.bfloat16 else ""
        raise ValueError(
            f"rounding must be chosen for prototypes in {str(weight).removeprefix('torch.')}, where most updates are "
            f"smaller than one unit of the last place: 'stochastic', {kahan}or 'nearest' (loses them); got None"
        )
    if rounding == "kahan" and weight != torch.bfloat16:
        raise ValueError(f"rounding='kahan' is for bfloat16 prototypes; got {weight}")
