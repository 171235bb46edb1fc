"""The optimizers' rules that update prototypes where their gradient is made, and rounding of float32 to fewer bits.

All arithmetic is float32, on tiles (R, columns) of whole or partial rows. The numbers of a step are a vector on the
device, which :func:`update_numbers_kernel` writes:

    numbers   0           1     2               3               4 ...
              finite      step  1/loss scale    max_class_norm  those of the rule

So a CUDA graph replays with new numbers, and a step whose gradients are not finite writes nothing, without the host.

Weight, state and compensation pass through the second-level cache once. They are marked to leave it first, so that dZ
and the sums stay.

Random bits come from Philox4x64-10. The key is (seed, step), the first word of the counter 1 + class·⌈D/16⌉ +
column // 16, and the third word the stream: 0 for the weight, 1 and 2 for the states. A block of 256 bits gives 16 bits
to each of 16 columns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.random import philox_impl

__all__ = ["update_numbers_kernel", "update_rows"]


@triton.jit
def power(base, exponent):
    """base^exponent of a float64 and an integer in [0, 2^32)."""
    result = base * 0.0 + 1.0
    for bit in range(32):
        result = tl.where((exponent >> bit) & 1 == 1, result * base, result)
        base *= base
    return result


@triton.jit(do_not_specialize=["max_class_norm", "lr", "first", "second", "third", "fourth"])
def update_numbers_kernel(
    # inputs
    finite_ptr,
    loss_scale_ptr,
    lr_ptr,
    # outputs
    numbers_ptr,
    # updated
    step_ptr,
    skipped_ptr,
    # sizes
    max_class_norm,
    lr,
    first,
    second,
    third,
    fourth,
    # constants
    RULE: tl.constexpr,
):
    """Write the numbers of this step, and count it; one program.

    finite: a bool; if True, step (float32) increases by 1, else skipped (int64). loss_scale: float32 of a GradScaler,
    or None. lr_ptr: a scalar of any floating dtype on the device, or None for the number ``lr``. first to fourth are
    the settings of the rule: (μ, dampening, λ) for "sgd" and "nesterov", (1 - β1, 1 - β2, ε, λ) for "adamw", (ε, λ) for
    "adagrad".
    """
    finite = tl.load(finite_ptr).to(tl.int32)
    step = tl.load(step_ptr) + finite.to(tl.float32)
    tl.store(step_ptr, step)
    tl.store(skipped_ptr, tl.load(skipped_ptr) + 1 - finite)
    tl.store(numbers_ptr, finite.to(tl.float32))
    tl.store(numbers_ptr + 1, step)
    inverse_loss_scale = 1.0
    if loss_scale_ptr is not None:
        inverse_loss_scale = 1.0 / tl.load(loss_scale_ptr)
    tl.store(numbers_ptr + 2, inverse_loss_scale)
    tl.store(numbers_ptr + 3, max_class_norm)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float32)
    if RULE == "adamw":
        rate, taken, squared = tl.cast(lr, tl.float64), tl.cast(first, tl.float64), tl.cast(second, tl.float64)
        count = step.to(tl.int64)
        correction = 1.0 - power(1.0 - taken, count)
        correction_squared = 1.0 - power(1.0 - squared, count)
        tl.store(numbers_ptr + 4, (1.0 - rate * tl.cast(fourth, tl.float64)).to(tl.float32))
        tl.store(numbers_ptr + 5, first)
        tl.store(numbers_ptr + 6, (1.0 - squared).to(tl.float32))
        tl.store(numbers_ptr + 7, second)
        tl.store(numbers_ptr + 8, (rate / correction).to(tl.float32))
        tl.store(numbers_ptr + 9, (1.0 / tl.sqrt(correction_squared)).to(tl.float32))
        tl.store(numbers_ptr + 10, third)
    elif RULE == "adagrad":
        tl.store(numbers_ptr + 4, lr)
        tl.store(numbers_ptr + 5, second)
        tl.store(numbers_ptr + 6, first)
    else:  # the first step sets the momentum buffer to the gradient, undampened, as torch does
        tl.store(numbers_ptr + 4, lr)
        tl.store(numbers_ptr + 5, third)
        tl.store(numbers_ptr + 6, tl.where(step == 1.0, 0.0, first))
        tl.store(numbers_ptr + 7, tl.where(step == 1.0, 1.0, 1.0 - second))
        tl.store(numbers_ptr + 8, first)


@triton.jit
def random_words(counter, seed, step, STREAM: tl.constexpr):
    """A block of four times 64 random bits for each counter."""
    counter = counter.to(tl.uint64)
    zero = tl.zeros(counter.shape, tl.uint64)
    stream = tl.full(counter.shape, STREAM, tl.uint64)
    return philox_impl(counter, zero, stream, zero, tl.cast(seed, tl.uint64), tl.cast(step, tl.uint64))


@triton.jit
def random_numbers(counter, seed, step, STREAM: tl.constexpr, COLUMNS: tl.constexpr):
    """(R, COLUMNS) int32 in [0, 2^16): row r takes a block for each 16 columns, from ``counter[r]`` on."""
    BLOCKS: tl.constexpr = COLUMNS // 16
    words = random_words(counter[:, None] + tl.arange(0, BLOCKS)[None, :], seed, step, STREAM)
    four = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))
    four = tl.reshape(four, (counter.shape[0], BLOCKS * 4, 1))
    parts = (four >> (tl.arange(0, 4) * 16).to(tl.uint64)[None, None, :]).to(tl.int32) & 0xFFFF
    return tl.reshape(parts, (counter.shape[0], COLUMNS)) ^ 0x8000


@triton.jit
def cut_off(values, numbers, BITS: tl.constexpr = 16):
    """Float32 with its last BITS bits cleared, after the BITS-bit ``numbers`` were added to them."""
    cut = ((values.to(tl.int32, bitcast=True) + numbers) & -(1 << BITS)).to(tl.float32, bitcast=True)
    return tl.where(values == values, cut, values)  # a NaN would run over


@triton.jit
def nearest(values, BITS: tl.constexpr = 16):
    """Float32 rounded to the nearest without its last BITS bits, ties to even. (The interpreter's cast truncates.)"""
    return cut_off(values, (1 << (BITS - 1)) - 1 + ((values.to(tl.int32, bitcast=True) >> BITS) & 1), BITS)


@triton.jit
def with_sign_of(size, values):
    """``size`` > 0 with the signs of ``values``."""
    bits = size.to(tl.int32, bitcast=True) | (values.to(tl.int32, bitcast=True) & -2147483648)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def rounded_to_float8(values, numbers):
    """Float32 up to 448 rounded stochastically to float8: see ``ltloss.optim.rounding.round_stochastically``.

    Below the smallest normal number, 2^-6, float8 has the spacing of [2^-6, 2^-5): values are moved there and back.
    """
    small = tl.full(values.shape, 2.0**-6, tl.float32)
    moved = tl.where(tl.abs(values) < small, with_sign_of(small, values), 0.0)
    return cut_off(values + moved, numbers * 16 + 8, 20) - moved


@triton.jit
def nearest_float8(values):
    """Float32 up to 448 rounded to the nearest float8, ties to even.

    Below 2^-6 these are the multiples of 2^-9, the spacing of float32 in [2^14, 2^15): one addition rounds to it.
    """
    small = (tl.abs(values) + 16384.0) - 16384.0
    return tl.where(tl.abs(values) < 2.0**-6, with_sign_of(small, values), nearest(values, 20))


@triton.jit
def power_of_two(exponent):
    """2^exponent for integers in [-126, 127], exactly."""
    return ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scaled_down(values, mask):
    """The smallest exponents (R,) with max|row| < 448·2^exponent, and the rows (R, D) times 2^-exponent.

    Exponents are at least -126, and 0 for a row that is zero or too small for that. A row with an infinity or a NaN
    becomes NaN.
    """
    size = tl.where(values == values, tl.abs(values), float("inf"))
    largest = tl.max(tl.where(mask, size, 0.0), 1)
    ratio = tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32))
    usual = (ratio > 0.0) & (ratio < float("inf"))
    exponent = tl.where(usual, (ratio.to(tl.int32, bitcast=True) >> 23) - 126, 0)
    factor = tl.where(largest == float("inf"), float("nan"), power_of_two(-exponent))
    return exponent, values * factor[:, None]


@triton.jit
def keep(pointers, values, mask, counter, seed, step, STREAM: tl.constexpr, ROUNDING: tl.constexpr):
    """Store values (R, columns), rounded to the dtype of the target."""
    if pointers.dtype.element_ty == tl.bfloat16:
        if ROUNDING == "stochastic":
            values = cut_off(values, random_numbers(counter, seed, step, STREAM, values.shape[1]))
        else:
            values = nearest(values)
    elif pointers.dtype.element_ty == tl.float8e4nv:
        if ROUNDING == "stochastic":
            values = rounded_to_float8(values, random_numbers(counter, seed, step, STREAM, values.shape[1]))
        else:
            values = nearest_float8(values)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def read(pointers, mask):
    """Load kept values as float32."""
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def sgd(g, w, velocities, mask, numbers_ptr, counter, seed, step, NESTEROV: tl.constexpr, ROUNDING: tl.constexpr):
    """v ← μ·v + (1 - dampening)·(g + λ·w), w ← w - η·v, or w - η·(g + λ·w + μ·v) by Nesterov. Returns w."""
    g += tl.load(numbers_ptr + 5) * w
    if velocities is not None:
        v = read(velocities, mask)
        v = tl.load(numbers_ptr + 6) * v + tl.load(numbers_ptr + 7) * g
        keep(velocities, v, mask, counter, seed, step, 1, ROUNDING)
        g = g + tl.load(numbers_ptr + 8) * v if NESTEROV else v
    return w - tl.load(numbers_ptr + 4) * g


@triton.jit
def adamw(g, w, averages, squares, mask, numbers_ptr, counter, seed, step, ROUNDING: tl.constexpr):
    """m ← β1·m + (1 - β1)·g, v ← β2·v + (1 - β2)·g², w ← (1 - η·λ)·w - η·m̂/(√v̂ + ε). Returns w."""
    v = read(squares, mask)
    v = tl.load(numbers_ptr + 6) * v + tl.load(numbers_ptr + 7) * (g * g)
    keep(squares, v, mask, counter, seed, step, 2, ROUNDING)
    m = read(averages, mask)
    m += tl.load(numbers_ptr + 5) * (g - m)
    keep(averages, m, mask, counter, seed, step, 1, ROUNDING)
    root = tl.sqrt(v) * tl.load(numbers_ptr + 9) + tl.load(numbers_ptr + 10)
    return tl.load(numbers_ptr + 4) * w - tl.load(numbers_ptr + 8) * (m / root)


@triton.jit
def adagrad(g, w, sums, classes, inside, width, numbers_ptr, seed, step, ROUNDING: tl.constexpr):
    """g ← g + λ·w, a_c ← a_c + ‖g_c‖²/D, w ← w - η·g/(√a_c + ε), for whole rows. Returns w."""
    g += tl.load(numbers_ptr + 5) * w
    a = tl.load(sums, mask=inside, other=0.0).to(tl.float32)
    a += tl.sum(g * g, 1) / width.to(tl.float32)
    kept = a
    if sums.dtype.element_ty == tl.bfloat16:
        if ROUNDING == "stochastic":
            word, _, _, _ = random_words(1 + classes, seed, step, 1)  # one column, so one block a class
            kept = cut_off(a, (word & 0xFFFF).to(tl.int32) ^ 0x8000)
        else:
            kept = nearest(a)
    tl.store(sums, kept.to(sums.dtype.element_ty), mask=inside)
    return w - g * (tl.load(numbers_ptr + 4) / (tl.sqrt(a) + tl.load(numbers_ptr + 6)))[:, None]


@triton.jit
def update_rows(
    g,
    w,
    rows,
    inside,
    column,
    width,
    numbers_ptr,
    weight_ptr,
    first_ptr,
    second_ptr,
    compensation_ptr,
    exponent_ptr,
    seed,
    first_class,
    RULE: tl.constexpr,
    ROUNDING: tl.constexpr,
    CLIP: tl.constexpr,
):
    """Update a tile w (R, columns) of prototypes by its gradient g, and store it; both are 0 beyond ``width``.

    rows (R,): rows of a slab whose first class is number ``first_class`` of all. The tile's columns begin at
    ``column``, a multiple of 16. For "adagrad", CLIP and float8 the tile must have whole rows.
    weight (classes, width): the kept prototypes. first, second (classes, width): the states, or None; first is
    (classes,) for "adagrad". compensation (classes, width): what rounding cut off the weight, or None.
    exponent (classes,) int8 of a float8 weight, or None; given g and w are those of the weight without the exponent.
    ROUNDING of bfloat16 and float8: "stochastic", "nearest", or "kahan", where the state is rounded stochastically.
    """
    COLUMNS: tl.constexpr = g.shape[1]
    KEPT: tl.constexpr = "nearest" if ROUNDING == "nearest" else "stochastic"
    columns = column + tl.arange(0, COLUMNS)
    inside &= tl.load(numbers_ptr).to(tl.int32) != 0
    mask = inside[:, None] & (columns < width)[None, :]
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    step = tl.load(numbers_ptr + 1).to(tl.int64)
    classes = rows.to(tl.int64) + first_class
    counter = 1 + classes * tl.cdiv(width, 16) + column // 16
    if exponent_ptr is not None:
        exponent = tl.load(exponent_ptr + rows, mask=inside, other=0).to(tl.int32)
        g *= power_of_two(-exponent)[:, None]
        w *= power_of_two(exponent)[:, None]
    g *= tl.load(numbers_ptr + 2)
    if CLIP:
        norm = tl.sqrt(tl.sum(g * g, 1))
        g *= tl.minimum(tl.load(numbers_ptr + 3) / norm, 1.0)[:, None]
    if compensation_ptr is not None:
        w += read(compensation_ptr + at, mask)
    if RULE == "adamw":
        w = adamw(g, w, first_ptr + at, second_ptr + at, mask, numbers_ptr, counter, seed, step, KEPT)
    elif RULE == "adagrad":
        w = adagrad(g, w, first_ptr + rows, classes, inside, width, numbers_ptr, seed, step, KEPT)
    else:
        velocities = None if first_ptr is None else first_ptr + at
        w = sgd(g, w, velocities, mask, numbers_ptr, counter, seed, step, RULE == "nesterov", KEPT)
    if compensation_ptr is not None:
        kept = nearest(w)
        keep(compensation_ptr + at, w - kept, mask, counter, seed, step, 0, "nearest")
        keep(weight_ptr + at, kept, mask, counter, seed, step, 0, "nearest")
    else:
        if exponent_ptr is not None:
            exponent, w = scaled_down(w, mask)
            tl.store(exponent_ptr + rows, exponent.to(tl.int8), mask=inside)
        keep(weight_ptr + at, w, mask, counter, seed, step, 0, KEPT)
