"""What can be read off the compiled kernels, on any machine: the compiler needs no GPU, only a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.compile
ROOT = Path(__file__).parents[2]

COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.kernel_report.record import recorded_kernels

cases = {case.name: case for case in recorded_kernels(90)}
target = GPUTarget("cuda", 90, 32)

def source(case):
    return ASTSource(fn=case.fn, signature=case.signature, constexprs=case.constexprs, attrs=case.attrs)

def options(case):
    return {"num_warps": case.num_warps, "num_stages": case.num_stages}

def compiled(case):
    return triton.compile(source(case), target=target, options=options(case)).asm
"""


def run_compiler(script: str) -> str:
    """Run a script behind COMPILE in a process without the interpreter; what it prints."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": paths}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE + script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_row_offsets_are_64_bit() -> None:
    """Wherever a row stride comes in at run time it is widened first; no product of it is formed in 32 bits."""
    script = """
names = ["row_norm bf16 x fp32, fixed", "sample bf16, fixed", "projection bf16, fixed", "nearest_gradient bf16, all"]
names += ["chunk_sum bf16, all", "pair_cosine bf16, all", "tile_candidates bf16, all", "tile_candidates bf16, top 5"]
ends = ("row_stride", "rows_stride", "copy_stride", "gradient_stride")
for name in names:
    ttir = compiled(cases[name])["ttir"].splitlines()
    strides = [arg for arg in cases[name].signature if arg.endswith(ends)]
    assert strides
    for stride in strides:
        uses = [line for line in ttir if re.search(rf"%{stride}\\b", line) and "tt.func" not in line]
        assert uses and all("extsi" in line and "i64" in line for line in uses), (name, stride, uses)
print("64 bits")
"""
    assert run_compiler(script) == "64 bits"


def test_no_sum_depends_on_who_comes_first() -> None:
    """Results repeat bit for bit: every sum of floats has one order, and only integers are combined by atomics.

    A maximum of integers has no order, and an integer sum counts the pairs of a tile or says where the next one goes.
    The first stage of the compiler shows them all: no later one makes an atomic out of anything else.
    """
    script = """
from triton._C.libtriton import ir
from triton.compiler.compiler import make_backend

backend, context = make_backend(target), ir.context()
ir.load_dialects(context)
backend.load_dialects(context)

def first_stage(case):
    chosen = backend.parse_options(options(case))
    implementation = backend.get_codegen_implementation(chosen)
    return str(source(case).make_ir(target, chosen, implementation, backend.get_module_map(), context))

atomic = re.compile(r"tt\\.atomic_(\\w+) (\\w+).*-> tensor<\\d+x(\\w+)>")
found = set()
for case in cases.values():
    text = first_stage(case)
    kinds = {(case.fn.__name__, *kind) for kind in atomic.findall(text)}
    assert bool(kinds) == ("atomic_" in text)
    found |= kinds
assert len(cases) > 200
print(sorted(found))
"""
    assert run_compiler(script) == str(
        [
            ("arrange_pairs_kernel", "rmw", "add", "i32"),
            ("best_tile_kernel", "rmw", "max", "i64"),
            ("count_tiles_kernel", "rmw", "add", "i32"),
            ("nearest_prototype_kernel", "rmw", "max", "i64"),
        ]
    )
