"""What an architecture allows, and from it: resident blocks per SM and the predicted share of its matrix peak.

The model is explained, and compared with what is known, in ``docs/kernels.md``. It knows the tensor cores, the
exponential unit and the instruction slots of one SM; it does not know latencies, barriers, or whether L2 delivers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

WARP = 32


@dataclass(frozen=True)
class Architecture:
    """Limits and rates of one streaming multiprocessor (SM).

    Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Rates per clock: its table
    "Throughput of Native Arithmetic Instructions" (exponentials are the line "rcp, rsqrt, ex2, lg2, sin, cos", maxima
    "compare, minimum, maximum"); four schedulers issue one warp instruction each. Matrix rate: dense bf16 peak of the
    data sheet / (SMs × boost clock): A100 312 TFLOP/s, 108 SMs, 1.41 GHz; H100 SXM 989, 132, 1.83; B200 2250, 148,
    1.85; rounded to a power of two.
    """

    name: str
    shared_per_sm: int  # bytes
    shared_per_block: int  # bytes, the most that one block may ask for
    tensor_memory_columns: int  # of 512 where accumulators live outside the registers
    half_flops_per_clock: int
    float32_per_clock: int
    registers_per_sm: int = 65536
    warps_per_sm: int = 64
    blocks_per_sm: int = 32
    exponentials_per_clock: int = 16
    maxima_per_clock: int = 64
    instructions_per_clock: int = 4 * WARP  # counted per thread

    @property
    def capability(self) -> int:
        """The number in the name: 90 for ``sm_90``."""
        return int(self.name.removeprefix("sm_"))


ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture("sm_80", 164 << 10, 163 << 10, 0, 2048, 64),
        Architecture("sm_90", 228 << 10, 227 << 10, 0, 4096, 128),
        Architecture("sm_100", 228 << 10, 227 << 10, 512, 8192, 128),
    )
}

# What the driver keeps of the shared memory for itself, per block (same table, a footnote).
RESERVED_SHARED = 1024
_REGISTER_UNIT = 256  # registers are handed out per warp, in units of this
_SHARED_UNIT = 128

# The product's rate relative to bf16 (the data sheets): TF32 runs at half of it, float32 at that of the float32 units.
MATRIX_RATE = {"bf16": 1.0, "fp16": 1.0, "tf32": 0.5}
OPERAND_BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}


def resident_blocks(arch: Architecture, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> int:
    """How many blocks fit one SM at a time.

    Args:
        arch: the architecture.
        registers: per thread.
        shared: bytes per block, without the kilobyte that the driver keeps.
        warps: per block.
        tensor_columns: columns of tensor memory per block (sm_100).
    """
    per_warp = -(-registers * WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    taken = -(-(shared + RESERVED_SHARED) // _SHARED_UNIT) * _SHARED_UNIT
    limits = [
        arch.blocks_per_sm,
        arch.warps_per_sm // warps,
        arch.registers_per_sm // per_warp // warps,
        arch.shared_per_sm // taken if shared <= arch.shared_per_block else 0,
    ]
    if tensor_columns:
        limits.append(arch.tensor_memory_columns // tensor_columns)
    return min(limits)


class Tile(NamedTuple):
    """One accumulator tile: (rows, classes), and the dtype its product runs in."""

    rows: int
    classes: int
    dtype: str  # bf16, fp16, tf32 or fp32


class Epilogue(NamedTuple):
    """Instructions per accumulator element that a thread executes outside of the product."""

    instructions: float
    exponentials: float
    float32: float
    maxima: float = 0.0


class Prediction(NamedTuple):
    """Shares of the matrix peak in [0, 1]; bytes of operands that L2 has to deliver per clock and SM at full rate."""

    serial_low: float
    serial_high: float
    overlapped: float
    operand_bytes_per_clock: float


def predict(arch: Architecture, tile: Tile, epilogue: Epilogue, blocks: int, width: int) -> Prediction:
    """Predict the share of the matrix peak of a kernel that multiplies tiles over ``width`` = D.

    T is the time of a tile's product, M that of its exponentials, I that of the other instructions: of issuing them
    all, of the float32 ones or of the maxima, whichever takes longest. Serially a tile takes at least T + max(M, I),
    when the exponential unit works while other instructions are issued, and at most T + M + I. With b resident blocks
    the epilogues hide under other blocks' products: a tile then takes no less than T, M, I or (T + M + I)/b.
    """
    elements = tile.rows * tile.classes
    rate = arch.half_flops_per_clock * MATRIX_RATE[tile.dtype]
    product = 2 * elements * width / rate
    exponential = elements * epilogue.exponentials / arch.exponentials_per_clock
    others = elements * max(
        (epilogue.instructions - epilogue.exponentials) / arch.instructions_per_clock,
        epilogue.float32 / arch.float32_per_clock,
        epilogue.maxima / arch.maxima_per_clock,
    )
    serial = product + exponential + others
    overlapped = max(product, exponential, others, serial / max(1, blocks))
    operands = (tile.rows + tile.classes) * width * OPERAND_BYTES[tile.dtype]
    return Prediction(
        product / serial, product / (product + max(exponential, others)), product / overlapped, operands / product
    )
