"""What the compiler makes of the kernels, held to limits without a GPU; and the parsers that find it out."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.profiles import nightly
from helpers.refusals import missing, refused

from benchmarks.kernel_report import sass
from benchmarks.kernel_report.__main__ import plain_table, with_table
from benchmarks.kernel_report.report import ARCHITECTURES, missing_tools, resident_blocks

ROOT = Path(__file__).parents[2]

# Shortened from real outputs: the class loop of a forward kernel for sm_90, two exponentials per thread, with a branch
# for tiles that hold a label, a wait loop, and a second copy of the epilogue that is reached without a product.
LISTING = """
	.section	.text.other,"ax",@progbits
.text.other:
        /*0000*/                   HMMA.16816.F32.BF16 R16, R164.reuse, R180, R16 ;
	.section	.text.forward_kernel,"ax",@progbits
	.sectionflags	@"SHF_BARRIERS=1"
        .global         forward_kernel
forward_kernel:
.text.forward_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
        /*0020*/                   MUFU.EX2 R6, R6 ;
        /*0030*/                   MUFU.EX2 R7, R7 ;
        /*0040*/                   FADD R6, R6, R7 ;
        /*0050*/                   BRA `(.L_x_4) ;
.L_x_0:
        /*0060*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0070*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R88, gdesc[UR4], R88 ;
        /*0090*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*00a0*/               @P1 BRA `(.L_x_3) ;
        /*00b0*/                   FMUL R24, R24, R5 ;
        /*00c0*/                   FFMA R24, R24, R4, -R3 ;
        /*00d0*/              @!P2 BRA `(.L_x_2) ;
        /*00e0*/                   FSEL R24, R24, -INF , P3 ;
        /*00f0*/                   FSEL R25, R25, -INF , P3 ;
.L_x_2:
        /*0100*/                   MUFU.EX2 R24, R24 ;
        /*0110*/                   MUFU.EX2 R25, R25 ;
        /*0120*/                   FADD R24, R24, R25 ;
.L_x_3:
        /*0130*/                   BRA.U UP0, `(.L_x_1) ;
.L_x_4:
        /*0140*/               @P1 EXIT ;
        /*0150*/                   STG.E desc[UR4][R2.64], R24 ;
        /*0160*/                   EXIT ;
.L_x_5:
        /*0170*/                   BRA `(.L_x_5);
"""

USAGE = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function forward_kernel:
  REG:254 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:1016 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function another:
  REG:8 STACK:0 SHARED:0 LOCAL:0
"""


def test_the_resources_of_the_kernel_are_found() -> None:
    assert sass.parse_resources(USAGE, "forward_kernel") == (254, 16, 1024)
    assert sass.parse_resources(USAGE, "another") == (8, 0, 0)
    with pytest.raises(ValueError) as caught:  # it shows what it was given, on lines of its own
        sass.parse_resources(USAGE, "missing")
    assert not missing(str(caught.value), "'missing'")


def test_instructions_are_counted_in_the_kernel_only() -> None:
    listing = sass.parse_listing(LISTING, "forward_kernel")
    assert len(listing.instructions) == 24
    assert listing.matrix_opcodes() == ["HGMMA.64x128x16.F32.BF16"]
    assert listing.count("UTMALDG") == 1
    assert listing.count("STL|LDL") == 0
    with refused("'missing'"):
        sass.parse_listing(LISTING, "missing")


def test_a_left_operand_in_registers_is_seen() -> None:
    product = "HGMMA.64x128x16.F32.BF16 R88, {}gdesc[UR4], R88 ;"
    assert sass.left_from_registers(LISTING) == 0
    assert sass.left_from_registers(LISTING + product.format("R24, ") + product.format("")) == 1


def test_the_epilogue_is_the_cheapest_walk_that_does_all_the_work() -> None:
    """Without the label's branch, without the copy before the loop, without the matrix instructions."""
    listing = sass.parse_listing(LISTING, "forward_kernel")
    walk = sass.cheapest_epilogue(listing, 2)
    expected = {"BRA": 2, "FMUL": 1, "FFMA": 1, "MUFU.EX2": 2, "FADD": 1, "BRA.U": 1}
    assert walk == Counter(expected)
    assert sass.float32_operations(Counter(expected)) == 3
    assert sass.cheapest_epilogue(listing, 3) is None, "no walk between two products has three exponentials"


def test_a_jump_by_call_is_followed_and_a_call_of_a_function_returns() -> None:
    text = """
	.section	.text.k,"ax",@progbits
        /*0000*/                   HMMA.16816.F32.BF16 R16, R164, R180, R16 ;
        /*0010*/              @!P5 CALL.REL.NOINC `(.L_x_0) ;
        /*0020*/                   NOP ;
        /*0030*/                   NOP ;
        /*0040*/                   EXIT ;
.L_x_0:
        /*0050*/                   CALL.REL.NOINC `($__internal_0) ;
        /*0060*/                   MUFU.EX2 R1, R1 ;
        /*0070*/                   EXIT ;
$__internal_0:
        /*0080*/                   RET.REL.NODEC R2 `(k) ;
"""
    walk = sass.cheapest_epilogue(sass.parse_listing(text, "k"), 1)
    assert walk == Counter({"CALL.REL.NOINC": 2, "MUFU.EX2": 1, "EXIT": 1})


def test_packed_arithmetic_counts_twice() -> None:
    executed = Counter({"FFMA2": 3, "FMUL2.FTZ": 1, "FADD.FTZ": 2, "FMNMX.NAN": 5, "FMNMX3": 2, "FMUL32I": 1})
    assert sass.float32_operations(executed) == 11
    assert sass.times_executed(executed, sass.MAXIMUM) == 9


def test_a_walk_may_be_asked_for_other_instructions() -> None:
    listing = sass.parse_listing(LISTING, "forward_kernel")
    walk = sass.cheapest_epilogue(listing, 2, "FSEL")
    assert walk == Counter({"BRA": 2, "FMUL": 1, "FFMA": 1, "FSEL": 2, "MUFU.EX2": 2, "FADD": 1, "BRA.U": 1})


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "columns", "blocks"),
    [
        (255, 115_712, 4, 0, 2),
        (255, 115_840, 4, 0, 1),  # two blocks' kilobytes for the driver do not fit any more
        (128, 98_448, 8, 0, 2),
        (129, 98_448, 8, 0, 1),
        (32, 0, 4, 0, 16),
        (16, 0, 1, 0, 32),
        (64, 40_000, 4, 256, 2),
        (64, 233_000, 4, 0, 0),
    ],
)
def test_resident_blocks(registers: int, shared: int, warps: int, columns: int, blocks: int) -> None:
    assert (
        resident_blocks(ARCHITECTURES["sm_90" if not columns else "sm_100"], registers, shared, warps, columns)
        == blocks
    )


class Most(NamedTuple):
    """Limits for a kernel on sm_90, a little above what it takes."""

    per_element: float  # instructions executed between two products, but for the matrix instructions
    float32: float  # of them FADD, FMUL and FFMA
    registers: int
    instructions: int  # in the whole kernel: one body, without a second copy of the epilogue
    shared_bytes: int = 115_712  # two blocks fit


LIMITS = {
    "cosine_logsumexp bf16, fixed": Most(5.05, 2.10, 200, 1550),
    "cosine_logsumexp fp16, fixed": Most(5.05, 2.10, 200, 1550),
    "cosine_logsumexp bf16, online": Most(7.4, 3.15, 205, 1850),
    "gradient_tile bf16, fixed": Most(5.1, 2.05, 205, 1600),
    "gradient_tile fp16, fixed": Most(5.1, 2.05, 205, 1600),
    "nearest_prototype bf16, all": Most(9.5, 2.35, 210, 1850),
    "nearest_prototype tf32, all": Most(9.5, 2.35, 210, 1850),
    "best_tile bf16, rows": Most(4.5, 1.05, 205, 1480),
    "best_tile bf16, top 5": Most(4.1, 1.05, 185, 1120),
}
# What Triton 3.8 makes more of than 3.6 and 3.7 do, for which the limits above are.
LIMITS_FROM_3_8 = {
    **LIMITS,
    "gradient_tile bf16, fixed": Most(5.1, 2.05, 210, 1600),
    "nearest_prototype tf32, all": Most(10.5, 2.35, 215, 1950),
    "best_tile bf16, rows": Most(4.85, 1.05, 215, 1650),
}

Row = dict[str, str]


# On the other architectures `make test` compiles what every step launches, and what takes most registers; the nightly
# profile (`make test-compile`) compiles all of it. The committed report must have every kernel of today.
ELSEWHERE = (
    r"^\w+ bf16, (fixed|all|top 5|adamw|everything)$|(fp16|fp32|tf32), everything$|everything, (kept|K = 3)$|clipped"
)


def report(output: Path, *options: str) -> list[Row]:
    """Rows made in a process that compiles: this one may hold interpreted kernels."""
    command = [sys.executable, "-m", "benchmarks.kernel_report", "--output", str(output), *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert output.exists(), done.stderr[-2000:]
    with output.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    if why := missing_tools():
        pytest.skip(f"{why}: kernels cannot be compiled ahead of time here")
    folder = tmp_path_factory.mktemp("report")
    if nightly():
        return report(folder / "all.csv")
    others = [f"--architecture={name}" for name in ARCHITECTURES if name != "sm_90"]
    hopper = report(folder / "sm_90.csv", "--architecture=sm_90")
    return hopper + report(folder / "others.csv", "--kernel", ELSEWHERE, *others)


def violations(rows: list[Row], holds: Callable[[Row], bool]) -> list[str]:
    shown = ("registers", "stack_bytes", "shared_bytes", "blocks_per_sm", "matrix_instructions", "error")
    return [
        f"{row['kernel']} on {row['architecture']}: { ({name: row[name] for name in shown}) }"
        for row in rows
        if not holds(row)
    ]


def from_3_8(rows: list[Row]) -> bool:
    return tuple(map(int, rows[0]["triton"].split(".")[:2])) >= (3, 8)


def on_hopper(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["architecture"] == "sm_90"]


def half_precision_tiles(rows: list[Row]) -> list[Row]:
    half = [row for row in on_hopper(rows) if row["dtype"] in ("bf16", "fp16")]
    return [row for row in half if not row["kernel"].startswith("tile_candidates")]


@pytest.mark.compile
def test_every_kernel_compiles_for_every_architecture(rows: list[Row]) -> None:
    assert violations(rows, lambda row: not row["error"]) == []
    kernels = Counter(row["kernel"] for row in rows if nightly() or re.search(ELSEWHERE, row["kernel"]))
    # Few samples, narrow rows: only where they have tiles of their own.
    everywhere = {name: count for name, count in kernels.items() if not re.search("N = |D = 1|fp8", name)}
    assert len(everywhere) > (80 if nightly() else 30)
    assert set(everywhere.values()) == {len(ARCHITECTURES)}
    float8 = {name: count for name, count in kernels.items() if "fp8" in name}
    assert set(float8.values()) == {len(ARCHITECTURES) - 1}  # sm_80 cannot convert it
    kernels = Counter(row["kernel"] for row in on_hopper(rows))
    families = {name.split()[0] for name in kernels}
    forward = {"row_norm", "sample", "cosine_logsumexp", "margin_loss", "reduce"}
    searches = {"nearest_prototype", "best_tile", "tile_candidates", "count_tiles", "arrange_pairs", "pair_cosine"}
    backward = {"sample_gradient", "gradient_tile", "prototype_gradient", "projection", "chunk_sum", "nearest_gradient"}
    assert families == forward | backward | searches | {"update_numbers"}


@pytest.mark.compile
def test_no_kernel_spills(rows: list[Row]) -> None:
    assert violations(rows, lambda row: row["stack_bytes"] == row["spill_instructions"] == "0") == []


@pytest.mark.compile
def test_products_run_on_the_tensor_core(rows: list[Row]) -> None:
    opcodes = {"sm_80": "HMMA.", "sm_90": "HGMMA.", "sm_100": "UTC"}
    wide = [row for row in rows if row["dtype"] not in ("", "fp32")]
    assert wide

    def holds(row: Row) -> bool:
        found = row["matrix_instructions"].split()
        return bool(found) and all(one.startswith(opcodes[row["architecture"]]) for one in found)

    assert violations(wide, holds) == []


@pytest.mark.compile
def test_operands_are_fetched_ahead(rows: list[Row]) -> None:
    """By the copy engine where there is one, by cp.async otherwise: a product never waits for its own loads."""
    wide = [row for row in rows if row["dtype"] not in ("", "fp32")]

    def holds(row: Row) -> bool:
        engine, threads = int(row["bulk_loads"]), int(row["async_copies"])
        gathers = row["kernel"].startswith("tile_candidates")  # rows that are not next to each other
        return engine == 0 < threads if row["architecture"] == "sm_80" or gathers else engine > 0 == threads

    assert violations(wide, holds) == []
    writing = [row for row in wide if row["kernel"].startswith("gradient_tile") and row["architecture"] != "sm_80"]
    assert violations(writing, lambda row: int(row["bulk_stores"]) > 0) == []


@pytest.mark.compile
def test_a_product_stays_in_flight_on_hopper(rows: list[Row]) -> None:
    """But where one product is all of a tile, or rows are rounded first: the other block is at work then."""
    half = [row for row in half_precision_tiles(rows) if not row["tile"].endswith("x128x128")]
    half = [row for row in half if not row["kernel"].startswith("cosine_logsumexp bf16 x fp32, everything, N = ")]
    assert violations(half, lambda row: int(row["waits_in_flight"]) >= 1) == []


@pytest.mark.compile
def test_both_operands_of_a_product_stay_in_shared_memory_on_hopper(rows: list[Row]) -> None:
    """From registers, the next product would wait until this one has read them."""
    products = [row for row in on_hopper(rows) if "HGMMA" in row["matrix_instructions"]]
    assert len(products) > 90
    assert violations(products, lambda row: row["left_from_registers"] == "0") == []


@pytest.mark.compile
def test_two_blocks_of_half_precision_tiles_fit_a_hopper_multiprocessor(rows: list[Row]) -> None:
    half = half_precision_tiles(rows)
    assert len(half) == 72, [row["kernel"] for row in half]
    assert violations(half, lambda row: int(row["blocks_per_sm"]) >= 2) == []


@pytest.mark.compile
def test_rows_of_a_hundred_columns_are_read_several_entries_at_a_time(rows: list[Row]) -> None:
    uneven = [row for row in rows if re.fullmatch("(row|proj|cosine|gradient).* D = 100", row["kernel"])]
    assert len(on_hopper(uneven)) == 4
    assert violations(uneven, lambda row: row["two_byte_loads"] == "0") == []


@pytest.mark.compile
def test_an_update_leaves_room_for_other_blocks_and_is_read_wide(rows: list[Row]) -> None:
    """It takes as long as memory does: state, sums and prototypes of several blocks are on their way at a time."""
    updates = [row for row in rows if re.search("^proj.*(sgd|nesterov|adamw|adagrad)", row["kernel"])]
    assert len(on_hopper(updates)) == 28
    least = {"1x8192": 1}
    assert violations(updates, lambda row: int(row["blocks_per_sm"]) >= least.get(row["tile"], 4)) == []
    assert violations(updates, lambda row: row["two_byte_loads"] == "0") == []
    products = [row for row in rows if re.search("^prototype_gradient.*(sgd|nesterov|adamw)", row["kernel"])]
    assert len(on_hopper(products)) == 7
    assert violations(products, lambda row: int(row["blocks_per_sm"]) >= 2) == []


@pytest.mark.compile
def test_one_exponential_per_element(rows: list[Row]) -> None:
    """A running maximum costs one more per row of a tile: that shows in the small tile of exact float32, kept."""
    tiles = [row for row in rows if row["exponentials_per_element"]]
    assert len(on_hopper(tiles)) >= 10

    def holds(row: Row) -> bool:
        found = row["exponentials_per_element"]
        fixed = "fixed" in row["kernel"] or "gradient" in row["kernel"]
        most = 1.5 if "fp32" in row["kernel"] and "kept" in row["kernel"] else 1.3  # a larger tile would spill
        return found == "1.00" if fixed else found != "fewer" and 1.0 <= float(found) <= most

    assert violations(tiles, holds) == []


@pytest.mark.compile
def test_the_nearest_prototype_costs_two_maxima_and_two_products_per_element(rows: list[Row]) -> None:
    """One for its row and one for its column; the rest is the way across the threads."""
    half = [row for row in on_hopper(rows) if row["kernel"].startswith("nearest_prototype") and row["dtype"] != "fp32"]
    assert len(half) == 3
    most = 3.05 if from_3_8(rows) else 2.65
    assert violations(half, lambda row: 2.0 <= float(row["maxima_per_element"]) <= most) == []


@pytest.mark.compile
@pytest.mark.parametrize("kernel", LIMITS)
def test_the_main_kernels_stay_as_small_as_they_are(rows: list[Row], kernel: str) -> None:
    row = next(row for row in on_hopper(rows) if row["kernel"] == kernel)
    most = (LIMITS_FROM_3_8 if from_3_8(rows) else LIMITS)[kernel]
    assert float(row["epilogue_per_element"]) <= most.per_element
    assert float(row["float32_per_element"]) <= most.float32
    assert int(row["registers"]) <= most.registers
    assert int(row["instructions"]) <= most.instructions
    assert int(row["shared_bytes"]) <= most.shared_bytes


@pytest.mark.compile
def test_the_committed_report_covers_every_kernel(rows: list[Row]) -> None:
    with (ROOT / "benchmarks" / "results" / "kernel_report.csv").open(newline="") as file:
        committed = list(csv.DictReader(file))
    names = {(row["kernel"], row["architecture"], row["tile"], row["warps"], row["stages"]) for row in committed}
    now = {(row["kernel"], row["architecture"], row["tile"], row["warps"], row["stages"]) for row in rows}
    assert now <= names, "make kernel-report, and commit the result"


def test_a_kernel_that_does_not_compile_is_in_the_table() -> None:
    row = {"kernel": "forward", "architecture": "sm_90", "error": "CompilationError: no"}
    assert plain_table([row]).splitlines()[1].split() == ["forward", "sm_90", "CompilationError:", "no"]


def test_a_page_without_a_place_for_the_tables_is_refused() -> None:
    with refused("'table'", "0"):
        with_table("no marks", [])
