"""What an architecture allows, and from it: how many blocks of a kernel are resident on a multiprocessor."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32


@dataclass(frozen=True)
class Architecture:
    """Limits of one streaming multiprocessor (SM).

    CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
    """

    name: str
    shared_per_sm: int  # bytes
    shared_per_block: int  # bytes, the most that one block may ask for
    tensor_memory_columns: int  # of 512 where accumulators live outside the registers
    registers_per_sm: int = 65536
    warps_per_sm: int = 64
    blocks_per_sm: int = 32

    @property
    def capability(self) -> int:
        """The number in the name: 90 for ``sm_90``."""
        return int(self.name.removeprefix("sm_"))


ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture("sm_80", 164 << 10, 163 << 10, 0),
        Architecture("sm_90", 228 << 10, 227 << 10, 0),
        Architecture("sm_100", 228 << 10, 227 << 10, 512),
    )
}

# What the driver keeps of the shared memory for itself, per block (same table, a footnote).
RESERVED_SHARED = 1024
_REGISTER_UNIT = 256  # registers are handed out per warp, in units of this
_SHARED_UNIT = 128


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
