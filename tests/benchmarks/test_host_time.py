"""Kept launches are those that Triton would choose, whatever the layout of the inputs."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.profiles import nightly

from benchmarks.kernel_report.report import missing_tools

ROOT = Path(__file__).parents[2]


def _run(code: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one holds interpreted kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.fixture(autouse=True)
def triton_compiles() -> None:
    if why := missing_tools():
        pytest.skip(f"{why}: Triton cannot prepare launches here")


@pytest.mark.compile
def test_kept_launches_are_those_that_triton_chooses() -> None:
    done = _run("from benchmarks.host_time import differences; print(differences())")
    assert done.stdout.strip() == "[]", done.stdout[-1000:] + done.stderr[-1000:]


@pytest.mark.compile
@pytest.mark.parametrize("forgotten", ["data_ptr() % 16", "stride()"])
def test_a_key_that_lacks_something_is_found(forgotten: str) -> None:
    """The comparison can fail: with a layout that says less, another kernel is launched."""
    code = f"""
import inspect
from ltloss_kernels import launching, cosine_logsumexp, backward_pass, margin_loss
source = inspect.getsource(launching.layout).replace("one.{forgotten}, ", "")
assert source != inspect.getsource(launching.layout)
exec(compile(source, "less", "exec"), vars(launching))
for module in (cosine_logsumexp, backward_pass, margin_loss):
    module.layout = launching.layout
from benchmarks.host_time import differences
try:
    print("found" if differences() else "nothing")
except Exception as error:
    print("found")
"""
    done = _run(code)
    assert done.stdout.strip() == "found", done.stdout[-1000:] + done.stderr[-1000:]


@pytest.mark.compile
@pytest.mark.skipif(not nightly(), reason="minutes: the nightly profile has it")
def test_the_launches_of_every_layout_compile(tmp_path: Path) -> None:
    output = tmp_path / "rows.csv"
    command = ["--layouts", "--architecture", "sm_90", "--processes", "2", "--output", str(output)]
    done = _run(f"from benchmarks.kernel_report.__main__ import main; raise SystemExit(main({command!r}))")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 100
    assert [row["kernel"] for row in rows if row["error"]] == []
    # A kernel on whole rows (N·D work) may put a few bytes on the stack; one with tiles may not.
    stack = {row["kernel"]: int(row["stack_bytes"]) for row in rows}
    assert [row["kernel"] for row in rows if stack[row["kernel"]] > (0 if row["dtype"] else 16)] == []
