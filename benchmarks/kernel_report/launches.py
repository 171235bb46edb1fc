"""``python -m benchmarks.kernel_report.launches [TESTS]``: compile every launch of the tests.

The tests run the kernels in Triton's interpreter, which accepts code that the compiler may refuse. So each launch is
recorded as Triton would specialise it on a GPU (types, alignments, sizes that are 1, constants, warps). The distinct
launches are then compiled in processes without the interpreter. Tiles are those of the tests, where bfloat16 products
run in float32.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.kernel_report.record import KernelCase, specialiser
from benchmarks.kernel_report.report import ARCHITECTURES, missing_tools, report
from benchmarks.kernel_report.scenarios import FLOAT8_FROM

FOLDER = "LTLOSS_LAUNCHES"  # environment variable: the folder into which processes of the tests write

# All tests that launch kernels in the interpreter.
_TESTS = ("tests/kernels", "tests/tools/test_tune_tiles.py", "tests/benchmarks/test_loss_gpu_stages.py")
_ROOT = Path(__file__).parents[2]
_PACKAGE = "ltloss_kernels."  # others are the tests' own kernels, which have mistakes


@contextmanager
def written_down() -> Iterator[None]:
    """Within the block, write each distinct launch of an interpreted kernel as a line of JSON into this process's file.

    Nothing is written unless ``LTLOSS_LAUNCHES`` names a folder.
    """
    if not (folder := os.environ.get(FOLDER)):
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    usual = InterpretedFunction.run
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (Path(folder) / f"{os.getpid()}.jsonl").open("a") as file:
        write = _writer(lambda line: print(line, file=file, flush=True))  # a signal may end the process

        def run(self: Any, *args: Any, **options: Any) -> Any:
            write(self, args, {name: value for name, value in options.items() if name not in ("grid", "warmup")})
            return usual(self, *args, **options)

        with mock.patch.object(InterpretedFunction, "run", run):
            yield


def _writer(write: Callable[[str], None]) -> Callable[[Any, Sequence[Any], dict[str, Any]], None]:
    """A function of an interpreted kernel, its arguments and options, which writes each new specialisation."""
    from triton.runtime.jit import JITFunction

    specialised = specialiser(90)  # tests without a GPU launch for it, see config/tile_table.py
    kernels: dict[Any, Any] = {}
    seen: set[str] = set()

    def launched(kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> None:
        if not kernel.fn.__module__.startswith(_PACKAGE):
            return
        if kernel.fn not in kernels:
            kernels[kernel.fn] = JITFunction(kernel.fn, **kernel.kwargs)
        line = _line(specialised(kernels[kernel.fn], args, options))
        if line not in seen:
            seen.add(line)
            write(line)

    return launched


def _line(case: KernelCase) -> str:
    """A specialisation as JSON; dictionaries with tuples as keys become lists of pairs."""
    values = {name: value for name, value in vars(case).items() if name not in ("name", "fn")}
    values |= {name: list(values[name].items()) for name in ("constexprs", "attrs")}
    return json.dumps({"module": case.fn.module, "kernel": case.fn.__name__, **values})


def _case(name: str, line: str) -> KernelCase:
    found = json.loads(line)
    fn = getattr(importlib.import_module(found.pop("module")), found.pop("kernel"))
    found |= {name: {tuple(path): value for path, value in found[name]} for name in ("constexprs", "attrs")}
    return KernelCase(name=name, fn=fn, **found)


@dataclass(frozen=True)
class Launched:
    """The launches written into a folder, as :func:`benchmarks.kernel_report.report.report` takes them."""

    folder: Path

    def lines(self) -> dict[str, str]:
        """The distinct lines, by a name for each."""
        distinct = {line for file in self.folder.glob("*.jsonl") for line in file.read_text().splitlines()}
        return {f"{json.loads(line)['kernel']} launch {n}": line for n, line in enumerate(sorted(distinct))}

    def __call__(self, arch: int) -> list[KernelCase]:
        """The launches with the kernels of this process; without float8 where Triton does not compile it."""
        cases = [_case(name, line) for name, line in self.lines().items()]
        return [case for case in cases if arch >= FLOAT8_FROM or not case.reads_float8]


def run(tests: Sequence[str], folder: Path, processes: int) -> int:
    """Run tests in the interpreter, even if there is a GPU; return pytest's exit code."""
    paths = os.pathsep.join(map(str, (_ROOT, _ROOT / "kernels", _ROOT / "tests")))
    environment = {**os.environ, FOLDER: str(folder), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    environment["TRITON_INTERPRET"] = "1"
    workers = ["-n", str(processes), "--dist", "worksteal"] if processes > 1 else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not compile", *workers, *tests]
    return subprocess.run(command, cwd=_ROOT, env=environment, check=False).returncode


def refusals(architecture: str, folder: Path, processes: int) -> int:
    """Compile the launches in a folder; print those refused and those that use a stack; return the number refused."""
    launched = Launched(folder)
    lines, rows = launched.lines(), report([architecture], "", processes, launched)
    refused = [row for row in rows if row["error"] or not row["blocks_per_sm"]]
    for row in refused:
        print(f"{row['kernel']}: {row['error'] or 'no block fits a multiprocessor'}\n  {lines[row['kernel']]}")
    stacks = [row for row in rows if not row["error"] and row["stack_bytes"]]
    for row in stacks:
        print(" ".join(f"{row[name]}" for name in ("kernel", "tile", "dtype", "stack_bytes")), "bytes of stack")
    compiled = len(rows) - len(refused)
    print(f"{architecture}: {compiled} of {len(rows)} distinct launches compile, {len(stacks)} of them use a stack")
    return len(refused)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests and compile their launches; 1 if a test fails, or a launch is refused, or there are none."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "tests", nargs="*", default=_TESTS, help="as pytest takes them (default: those that launch kernels)"
    )
    parser.add_argument("--architecture", action="append", choices=list(ARCHITECTURES), help="(default: sm_90)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="keep there what is launched (default: nowhere)")
    options = parser.parse_args(arguments)
    if why := missing_tools():
        print(f"nothing is compiled: {why}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        failed = run(options.tests, folder, options.processes) != 0
        lines = Launched(folder).lines()
        for architecture in options.architecture or ["sm_90"]:
            failed |= refusals(architecture, folder, options.processes) > 0
    return int(failed or not lines)


if __name__ == "__main__":
    raise SystemExit(main())
