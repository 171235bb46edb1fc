"""Elementary functions of a float32, more accurate than the hardware's, and exact scaling by powers of two.

The GPU's own ``log``, ``cos`` and others are good to some 1e-6 absolute, so a loss or an angle near zero would be
mostly error. Each function here is good to a few units in the last place. They are only applied to N-vectors, which
costs nothing next to a matrix product.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PI = tl.constexpr(3.141592653589793)
TINY = tl.constexpr(2.0**-126)  # smallest normal float32
ANGLE_FLOOR = tl.constexpr(2.0**-11)  # slopes of arccos are taken no closer to 0 and pi than this


@triton.jit
def multiple(value, UNIT: tl.constexpr):
    """``value``, which must be a multiple of UNIT: the compiler then knows it and loads UNIT entries at once."""
    return tl.cast(value, tl.int64) // UNIT * UNIT


@triton.jit
def power_of_two_below(value):
    """2^-floor(log2 value) for positive normal values, 1 for zero: multiplying by it brings ``value`` into [1, 2)."""
    exponent = tl.minimum(tl.maximum(value.to(tl.int32, bitcast=True) >> 23, 1), 253)
    power = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(value == 0.0, 1.0, power)


@triton.jit
def scaled_rows(values):
    """Rows (R, D) times a power of two each, so that squares neither overflow nor vanish.

    Returns the scaled rows (R, D), the powers (R,), and 1/length of the scaled rows (R,), 0 for a zero row.
    """
    largest = tl.max(tl.abs(values), 1)
    power = power_of_two_below(largest)
    scaled = values * power[:, None]
    length = tl.sqrt_rn(tl.sum(scaled * scaled, 1))
    # Below the smallest normal number a reciprocal would overflow: such a row counts as zero.
    inverse = tl.where(largest < TINY, 0.0, tl.div_rn(tl.full(length.shape, 1.0, tl.float32), length))
    # An infinite entry has no direction, and neither it nor a row of NaN may look like a zero row.
    inverse = tl.where(length < float("inf"), inverse, float("nan"))
    return scaled, power, inverse


@triton.jit
def unit_rows(scaled, inverse):
    """Rows of length 1 from what :func:`scaled_rows` returns, before they are rounded; zero rows stay zero."""
    return scaled * inverse[:, None]


@triton.jit
def exact_cosine(x, w):
    """x̂·ŵ of rows (R, D) of moderate length, (R,) in [-1, 1], rounded to float32 once.

    In float64: R·D work. Near ±1 an angular margin magnifies the error of the cosine by 1/sin θ.
    """
    wide_x, wide_w = x.to(tl.float64), w.to(tl.float64)
    squares = tl.sum(wide_x * wide_x, 1) * tl.sum(wide_w * wide_w, 1)
    cosine = tl.sum(wide_x * wide_w, 1) / tl.sqrt(squares)
    cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))  # NaN stays NaN
    return cosine.to(tl.float32)


@triton.jit
def exact_product(x, w):
    """x·w of rows (R, D) of moderate length, (R,), rounded to float32 once; in float64 as :func:`exact_cosine`."""
    return tl.sum(x.to(tl.float64) * w.to(tl.float64), 1).to(tl.float32)


@triton.jit
def log1p(value):
    """log(1 + value) for value in [0, 1]: 2·artanh(value/(2 + value)), whose series ends below float32's resolution."""
    y = tl.div_rn(value, 2.0 + value)
    q = y * y
    series = 1.0 / 15 + q * (1.0 / 17)
    series = 1.0 / 11 + q * (1.0 / 13 + q * series)
    series = 1.0 / 7 + q * (1.0 / 9 + q * series)
    series = 1.0 / 3 + q * (1.0 / 5 + q * series)
    return 2.0 * (y + y * (q * series))


@triton.jit
def log(value):
    """Natural logarithm of a normal number; -inf for 0, and infinity and NaN as they are."""
    bits = value.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    mantissa = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    finite = exponent * LN2 + log1p(mantissa - 1.0)
    return tl.where(value == 0.0, float("-inf"), tl.where(value < float("inf"), finite, value))


@triton.jit
def exp_of_negative(value):
    """exp(value) for value <= 0: 2^(value·log2 e), corrected for the rounding error of its exponent."""
    product = value * LOG2E
    # log2 e in two parts, the first with 12 bits: its product with the leading 12 bits of value is exact.
    leading = (value.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    rest = value - leading
    whole = leading * 1.4423828125
    remainder = leading * 3.122283889634074e-4 + rest * LOG2E
    lost = (whole - product) + remainder
    power = tl.exp2(product)
    return tl.where(value < -126.0, 0.0, power + power * (lost * LN2))


@triton.jit
def arccos(cosine):
    """The angle in [0, π] of a cosine; values outside [-1, 1] count as ±1, NaN stays NaN. (Coefficients: fdlibm.)"""
    clamped = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))
    size = tl.abs(clamped)
    outer = size > 0.5
    z = tl.where(outer, 0.5 * (1.0 - size), size * size)
    root = tl.sqrt_rn(z)
    ratio = z * (1.6666586697e-01 + z * (-4.2743422091e-02 + z * -8.6563630030e-03)) / (1.0 - 7.0662963390e-01 * z)
    near = 2.0 * (root + root * ratio)  # arccos|c| for |c| > 1/2
    middle = 1.5707963705062866 - (clamped + (4.371139000186241e-08 + clamped * ratio))
    return tl.where(outer, tl.where(clamped > 0.0, near, 3.1415927410125732 - (near + 8.742278e-08)), middle)


@triton.jit
def sine_cosine(angle):
    """(sin, cos) of an angle of up to some hundred radians.

    Multiples of π/2 are subtracted in three parts. (Coefficients: Cephes.)
    """
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = ((angle - quarter * 1.5703125) - quarter * 4.837512969970703125e-4) - quarter * 7.549789954891882e-08
    z = rest * rest
    sine = rest + rest * (z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4)))
    cosine = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    turn = quarter.to(tl.int32)
    swap = (turn & 1) == 1
    sine, cosine = tl.where(swap, cosine, sine), tl.where(swap, sine, cosine)
    return tl.where((turn & 2) == 2, -sine, sine), tl.where(((turn + 1) & 2) == 2, -cosine, cosine)
