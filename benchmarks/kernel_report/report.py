"""The rows of the report: each recorded kernel compiled, disassembled and described, in processes of their own."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.kernel_report import sass
from benchmarks.kernel_report.occupancy import ARCHITECTURES, WARP, Architecture, resident_blocks
from benchmarks.kernel_report.record import KernelCase, recorded_kernels

Row = dict[str, Any]


def wheel_binary(name: str) -> Path:
    """Path of one of the NVIDIA tools that Triton's wheel brings along: ptxas, cuobjdump, nvdisasm."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def missing_tools() -> str:
    """Why no report can be made here, or an empty string."""
    try:
        missing = [name for name in ("ptxas", "cuobjdump", "nvdisasm") if not wheel_binary(name).exists()]
    except ImportError:
        return "Triton is not installed"
    return f"Triton's wheel has no {', '.join(missing)}" if missing else ""


def _output(tool: str, *arguments: str) -> str:
    """What a tool prints; only an exit code is an error, warnings on stderr are not."""
    done = subprocess.run([str(wheel_binary(tool)), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def tool_versions() -> dict[str, str]:
    """Versions that decide what the compiler makes of a kernel."""
    import triton

    versions = {"triton": triton.__version__}
    for tool in ("ptxas", "ptxas-blackwell"):  # the second, where there is one, is used from sm_100 on
        if wheel_binary(tool).exists():
            found = re.search(r"\bV(\d+\.\d+\.\d+)", _output(tool, "--version"))
            versions[tool] = found.group(1) if found else "unknown"
    return versions


class Job(NamedTuple):
    """One kernel for one architecture, by names, which travel between processes."""

    architecture: str
    kernel: str


@functools.cache
def _cases(capability: int) -> dict[str, KernelCase]:
    return {case.name: case for case in recorded_kernels(capability)}


def jobs(architecture: str, pattern: str = "") -> list[Job]:
    """Every kernel that is launched on an architecture and whose name contains the regular expression ``pattern``."""
    names = _cases(ARCHITECTURES[architecture].capability)
    return [Job(architecture, name) for name in names if re.search(pattern, name)]


def report_row(job: Job) -> Row:
    """Compile one kernel and describe it. A kernel that does not compile has a row too, with ``error`` filled."""
    arch = ARCHITECTURES[job.architecture]
    case = _cases(arch.capability)[job.kernel]
    row: Row = {"architecture": arch.name, "kernel": case.name, "tile": _tile_name(case.constants)}
    row |= {"warps": case.num_warps, "stages": case.num_stages, "dtype": case.dtype}
    try:
        return {**row, "error": "", **_describe(case, arch)}
    except Exception as error:  # whatever a compiler raises belongs into the table
        message = " ".join(str(error).split())  # a compiler shows the source first, and says at the end what is wrong
        return {**row, "error": f"{type(error).__name__}: {message[-300:]}"}


def _tile_name(constants: dict[str, Any]) -> str:
    """Rows x classes x depth of a matrix tile, rows x width of whole rows, or rows of vectors."""
    for names in (
        ("BLOCK_ROWS", "BLOCK_CLASSES", "BLOCK_DEPTH"),
        ("ROWS", "WIDTH"),
        ("ENTRIES", "WIDTH"),
        ("ROWS",),
        ("BLOCK",),
    ):
        if all(name in constants for name in names):
            return "x".join(str(constants[name]) for name in names)
    return ""


def _describe(case: KernelCase, arch: Architecture) -> Row:
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
        disassembly = _output("nvdisasm", "-c", file.name)
    listing = sass.parse_listing(disassembly, name)
    shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", 0) or 0
    blocks = resident_blocks(arch, resources.registers, shared, case.num_warps, columns)
    return {
        "registers": resources.registers,
        "stack_bytes": resources.stack,
        "spill_instructions": listing.count(r"STL|LDL"),
        "shared_bytes": shared,
        "tensor_memory_columns": columns,
        "blocks_per_sm": blocks,
        "matrix_instructions": " ".join(listing.matrix_opcodes()),
        # Hopper: waits that leave one product running, so that the next is issued before this one has ended.
        "waits_in_flight": len(re.findall(r"WARPGROUP\.DEPBAR\S* gsb0, 0x1\b", disassembly)),
        "bulk_loads": listing.count("UTMALDG"),
        "bulk_stores": listing.count("UTMASTG"),
        "async_copies": listing.count("LDGSTS"),
        "instructions": len(listing.instructions),
        **_per_element(case, listing),
    }


def _per_element(case: KernelCase, listing: sass.Listing) -> Row:
    """The epilogue's instructions per accumulator element in the common branch, for kernels with tiles."""
    if not case.elements:
        return {}
    per_thread = max(1, case.elements // (case.num_warps * WARP))
    needed, column = (sass.MAXIMUM, "maxima") if case.maxima else (sass.EXPONENTIAL, "exponentials")
    executed = sass.cheapest_epilogue(listing, max(1, case.maxima) * per_thread, needed)
    if executed is None:  # no walk between two products has as many for every element
        return {f"{column}_per_element": "fewer"}
    row: Row = {f"{column}_per_element": f"{sass.times_executed(executed, needed) / per_thread:.2f}"}
    if case.dtype == "fp32":  # such a product runs on the same units as the epilogue, which it dwarfs
        return row
    row["float32_per_element"] = f"{sass.float32_operations(executed) / per_thread:.2f}"
    row["epilogue_per_element"] = f"{executed.total() / per_thread:.2f}"
    return row


def report(architectures: Sequence[str], pattern: str, processes: int) -> list[Row]:
    """Describe every kernel, in fresh processes that really compile: under the interpreter a kernel is no kernel."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["LTLOSS_TILES"] = ""  # the project's tiles, not those tuned on this machine
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        work = list(pool.map(jobs, architectures, [pattern] * len(architectures)))
        return list(pool.map(report_row, [job for some in work for job in some]))
