"""The rows of the report: each recorded kernel is compiled, disassembled and described, in separate processes."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.kernel_report import sass
from benchmarks.kernel_report.record import KernelCase, recorded_kernels
from benchmarks.timing import fresh_processes
from ltloss.errors import in_one_line

Row = dict[str, Any]
Recorded = Callable[[int], list[KernelCase]]  # the cases for a compute capability; must be hashable and picklable
WARP = 32


class Architecture(NamedTuple):
    """Limits of one streaming multiprocessor (SM); shared memory in bytes.

    Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
    """

    capability: int
    shared_per_sm: int
    shared_per_block: int  # the most that one block may ask for
    tensor_memory_columns: int = 0  # where accumulators live outside the registers
    registers_per_sm: int = 65536
    warps_per_sm: int = 64
    blocks_per_sm: int = 32


ARCHITECTURES = {
    "sm_80": Architecture(80, 164 << 10, 163 << 10),
    "sm_90": Architecture(90, 228 << 10, 227 << 10),
    "sm_100": Architecture(100, 228 << 10, 227 << 10, 512),
}

# Bytes of shared memory that the driver reserves per block (a footnote to the same table).
RESERVED_SHARED = 1024
_REGISTER_UNIT = 256  # registers are allocated per warp, in units of this
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


def wheel_binary(name: str) -> Path:
    """Path of one of the NVIDIA tools that Triton's wheel brings along: ptxas, cuobjdump, nvdisasm."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def missing_tools() -> str:
    """Why no report can be made here; empty if it can."""
    try:
        missing = [name for name in ("ptxas", "cuobjdump", "nvdisasm") if not wheel_binary(name).exists()]
    except ImportError:
        return "Triton is not installed"
    return f"Triton's wheel has no {', '.join(missing)}" if missing else ""


def _output(tool: str, *arguments: str) -> str:
    """The output of a tool; RuntimeError for an exit code other than 0, but not for warnings on stderr."""
    done = subprocess.run([str(wheel_binary(tool)), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def tool_versions() -> dict[str, str]:
    """Versions of Triton and its assemblers, which decide the machine code of a kernel."""
    import triton

    versions = {"triton": triton.__version__}
    for tool in ("ptxas", "ptxas-blackwell"):  # the second, where there is one, is used from sm_100 on
        if wheel_binary(tool).exists():
            found = re.search(r"\bV(\d+\.\d+\.\d+)", _output(tool, "--version"))
            versions[tool] = found.group(1) if found else "unknown"
    return versions


@cache
def _cases(architecture: str, recorded: Recorded) -> dict[str, KernelCase]:
    return {case.name: case for case in recorded(ARCHITECTURES[architecture].capability)}


def kernel_names(architecture: str, pattern: str = "", recorded: Recorded = recorded_kernels) -> list[str]:
    """The names of the kernels launched on an architecture in which the regular expression ``pattern`` is found."""
    return [name for name in _cases(architecture, recorded) if re.search(pattern, name)]


def report_row(architecture: str, kernel: str, recorded: Recorded = recorded_kernels) -> Row:
    """Compile one kernel and describe it. A kernel that does not compile has a row with its ``error``."""
    case = _cases(architecture, recorded)[kernel]
    row: Row = {"architecture": architecture, "kernel": kernel, "tile": _tile_name(case.constants)}
    row |= {"warps": case.num_warps, "stages": case.num_stages, "dtype": case.dtype}
    try:
        return {
            **row,
            "error": "",
            **_describe(case, ARCHITECTURES[architecture], disassembled=recorded is recorded_kernels),
        }
    except Exception as error:  # whatever a compiler raises belongs into the table
        message = in_one_line(error)  # a compiler shows the source first, and says at the end what is wrong
        return {**row, "error": f"{type(error).__name__}: {message[-300:]}"}


def _tile_name(constants: dict[str, Any]) -> str:
    """Rows x classes x depth of a matrix tile, rows x width of whole rows, or rows of vectors."""
    for names in ("BLOCK_ROWS BLOCK_CLASSES BLOCK_DEPTH", "ROWS WIDTH", "ENTRIES WIDTH", "ROWS", "BLOCK"):
        if all(name in constants for name in names.split()):
            return "x".join(str(constants[name]) for name in names.split())
    return ""


def _describe(case: KernelCase, arch: Architecture, *, disassembled: bool) -> Row:
    """Resources and instruction counts of a kernel. ``disassembled`` False saves most of the time, and the counts."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=case.fn, signature=case.signature, constexprs=case.constexprs, attrs=case.attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch.capability, WARP), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        name = compiled.metadata.name
        resources = sass.parse_resources(_output("cuobjdump", "--dump-resource-usage", file.name), name)
        # -ndf leaves out a dataflow analysis, which takes a quarter of the time and changes nothing that is printed.
        disassembly = _output("nvdisasm", "-c", "-ndf", file.name) if disassembled else ""
    shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", 0) or 0
    blocks = resident_blocks(arch, resources.registers, shared, case.num_warps, columns)
    row = {
        "registers": resources.registers,
        "stack_bytes": resources.stack,
        "spill_instructions": "",  # known from the disassembly
        "shared_bytes": shared,
        "tensor_memory_columns": columns,
        "blocks_per_sm": blocks,
    }
    if not disassembled:
        return row
    listing = sass.parse_listing(disassembly, name)
    return {
        **row,
        "spill_instructions": listing.count(r"STL|LDL"),
        "matrix_instructions": " ".join(listing.matrix_opcodes()),
        # Hopper: waits that leave one product in flight, so that the next is issued before it has ended.
        "waits_in_flight": len(re.findall(r"WARPGROUP\.DEPBAR\S* gsb0, 0x1\b", disassembly)),
        "left_from_registers": sass.left_from_registers(disassembly),
        "two_byte_loads": listing.count(r"LDG\S*\.U16"),
        "bulk_loads": listing.count("UTMALDG"),
        "bulk_stores": listing.count("UTMASTG"),
        "async_copies": listing.count("LDGSTS"),
        "instructions": len(listing.instructions),
        **_per_element(case, listing),
    }


def _per_element(case: KernelCase, listing: sass.Listing) -> Row:
    """Instructions of the epilogue per accumulator element in the common branch; empty for kernels without tiles."""
    if not case.elements:
        return {}
    per_thread = max(1, case.elements // (case.num_warps * WARP))
    needed, column = (sass.MAXIMUM, "maxima") if case.maxima else (sass.EXPONENTIAL, "exponentials")
    executed = sass.cheapest_epilogue(listing, max(1, case.maxima) * per_thread, needed)
    if executed is None:  # no path between two products has one for every element
        return {f"{column}_per_element": "fewer"}
    row: Row = {f"{column}_per_element": f"{sass.times_executed(executed, needed) / per_thread:.2f}"}
    if case.dtype == "fp32":  # the product runs on the units of the epilogue, and has far more instructions
        return row
    row["float32_per_element"] = f"{sass.float32_operations(executed) / per_thread:.2f}"
    row["epilogue_per_element"] = f"{executed.total() / per_thread:.2f}"
    return row


def report(
    architectures: Sequence[str], pattern: str, processes: int, recorded: Recorded = recorded_kernels
) -> list[Row]:
    """Describe every kernel, in fresh processes without the interpreter, under which nothing is compiled.

    Only the default ``recorded`` is disassembled, which takes most of the time.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["LTLOSS_TILES"] = ""  # the project's tiles, not those tuned on this machine
    with fresh_processes(processes) as pool:
        names = list(pool.map(partial(kernel_names, pattern=pattern, recorded=recorded), architectures))
        work = [(arch, name) for arch, some in zip(architectures, names, strict=True) for name in some]
        return list(pool.map(partial(report_row, recorded=recorded), *zip(*work, strict=True))) if work else []
