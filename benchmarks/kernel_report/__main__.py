"""``python -m benchmarks.kernel_report``: what the compiler makes of every production kernel, seen without a GPU.

Each kernel is compiled ahead of time for sm_80, sm_90 and sm_100 and disassembled with the tools in Triton's wheel.
The table says what fits (registers, spills, shared memory, resident blocks), what the product runs on, what the
epilogue costs per accumulator element, and which share of the matrix peak follows
(``benchmarks/kernel_report/model.py``). Written to ``results/kernel_report.csv``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.kernel_report import sass
from benchmarks.kernel_report.model import ARCHITECTURES, MATRIX_RATE, WARP, Architecture, Epilogue, Tile, predict
from benchmarks.kernel_report.model import resident_blocks as blocks_that_fit
from benchmarks.kernel_report.tables import WIDTHS, plain_table, with_tables
from benchmarks.timing import RESULTS, stamp, write_rows

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


def jobs(architectures: Iterable[str], pattern: str = "") -> list[Job]:
    """Every production kernel whose name contains the regular expression ``pattern``, for every architecture."""
    from ltloss_kernels.production import production_kernels

    return [
        Job(name, case.name)
        for name in architectures
        for case in production_kernels(ARCHITECTURES[name].capability)
        if re.search(pattern, case.name)
    ]


def report_row(job: Job) -> Row:
    """Compile one kernel and describe it. A kernel that does not compile has a row too, with ``error`` filled."""
    from ltloss_kernels.production import production_kernels

    arch = ARCHITECTURES[job.architecture]
    case = next(case for case in production_kernels(arch.capability) if case.name == job.kernel)
    row: Row = {"architecture": arch.name, "kernel": case.name, "tile": _tile_name(case.constexprs)}
    row |= {"warps": case.num_warps, "stages": case.num_stages, "needs_tensor_core": int(case.matrix_instruction)}
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


def _describe(case: Any, arch: Architecture) -> Row:
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
    blocks = blocks_that_fit(arch, resources.registers, shared, case.num_warps, columns)
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
        **_per_element(case, arch, listing, blocks),
    }


def tile_of(case: Any) -> Tile | None:
    """The accumulator tile of a kernel, or None for one without (row norms, combining, reductions)."""
    if not case.elements:
        return None
    rows = case.constexprs["BLOCK_ROWS"]
    operand = re.search(r"bf16|fp16|fp32", next(iter(case.signature.values())))
    dtype = operand.group() if operand else "fp32"
    if dtype == "fp32" and case.constexprs["PRECISION"] == "tf32":
        dtype = "tf32"
    return Tile(rows, case.elements // rows, dtype)


def _per_element(case: Any, arch: Architecture, listing: sass.Listing, blocks: int) -> Row:
    """The epilogue's cost per accumulator element in the common branch, and the prediction, for kernels with tiles."""
    tile = tile_of(case)
    if tile is None:
        return {}
    per_thread = max(1, case.elements // (case.num_warps * WARP))
    needed, column = (sass.MAXIMUM, "maxima") if case.maxima else (sass.EXPONENTIAL, "exponentials")
    executed = sass.cheapest_epilogue(listing, max(1, case.maxima) * per_thread, needed)
    if executed is None:  # no walk between two products has as many for every element
        return {"dtype": tile.dtype, f"{column}_per_element": "fewer"}
    found = sass.times_executed(executed, needed) / per_thread
    row: Row = {"dtype": tile.dtype, f"{column}_per_element": f"{found:.2f}"}
    if tile.dtype not in MATRIX_RATE:  # a float32 product runs on the same units as the epilogue, which it dwarfs
        return row
    float32, instructions = sass.float32_operations(executed) / per_thread, executed.total() / per_thread
    epilogue = Epilogue(instructions, 0.0 if case.maxima else found, float32, found if case.maxima else 0.0)
    row |= {"float32_per_element": f"{float32:.2f}", "epilogue_per_element": f"{instructions:.2f}"}
    if not listing.count("UTMALDG|LDGSTS"):  # the product waits for every load, of which the model knows nothing
        return row
    for width in WIDTHS:
        expected = predict(arch, tile, epilogue, blocks, width)
        row[f"serial_D{width}"] = f"{expected.serial_low:.2f}"
        row[f"overlapped_D{width}"] = f"{expected.overlapped:.2f}"
        row["operand_bytes_per_clock"] = f"{expected.operand_bytes_per_clock:.0f}"
    return row


def report(work: Sequence[Job], processes: int) -> list[Row]:
    """Describe every job, in fresh processes that really compile: under the interpreter a kernel is no kernel."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["LTLOSS_TILES"] = ""  # the project's tiles, not those tuned on this machine
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(report_row, work))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, write the CSV; 1 if a kernel does not compile."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", default="", metavar="REGEX", help="only kernels whose name matches")
    parser.add_argument("--architecture", action="append", choices=list(ARCHITECTURES), help="(default: all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--documentation", type=Path, metavar="FILE", help="renew the marked tables in this page")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernel_report.csv", help="CSV to write")
    options = parser.parse_args(arguments)
    if why := missing_tools():
        print(f"no kernel report: {why}", file=sys.stderr)
        return 2
    rows = report(jobs(options.architecture or ARCHITECTURES, options.kernel), options.processes)
    print(plain_table(rows))
    who = {name: value for name, value in stamp().items() if name in ("date", "commit")}
    write_rows([{**row, **who, **tool_versions()} for row in rows], options.output)
    if options.documentation:
        options.documentation.write_text(with_tables(options.documentation.read_text(), rows))
    failed = [row for row in rows if row["error"]]
    print(f"wrote {options.output}: {len(rows)} kernels, {len(failed)} of them do not compile")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
