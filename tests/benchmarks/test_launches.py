"""What the tests launch in the interpreter, compiled: a cheap part of ``make compile-launches``."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.kernel_report import launches
from benchmarks.kernel_report.report import missing_tools

pytest.importorskip("triton")

import ltloss_kernels
from ltloss_kernels.row_norms import row_norms

# Every kernel, in each dtype of the products that the interpreter has.
TESTS = (
    "test_operators.py::test_results_repeat_bit_for_bit",
    "test_nearest_kernel.py::test_lowest_of_many_ties",
    "test_kernel_accuracy.py::test_every_scale",
    "test_nearest_hubs.py::test_several_hubs_side_by_side",
    "test_prototype_update.py::test_float16_features",
)
BY_16 = [["tt.divisibility", 16]]


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in launches.Launched(folder).lines().values()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="writes down what is interpreted")
def test_a_launch_is_written_down_as_it_is_specialised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointers and numbers by whether 16 divides them, ones and None as constants; equal ones once."""
    monkeypatch.setenv(launches.FOLDER, str(tmp_path))
    memory, factor = torch.ones(100), torch.empty(16)
    with launches.written_down(), np.errstate(all="ignore"):
        for first, rows, width in ((0, 5, 16), (0, 3, 16), (1, 5, 16), (0, 5, 17)):
            row_norms(memory[first : first + rows * width].view(rows, width), factor=factor[:rows])
    found = written(tmp_path)
    assert {one["kernel"] for one in found} == {"row_norm_kernel"}
    seen = []
    for one in found:
        names = list(one["signature"])
        attributes, constants = ({names[path[0]]: v for path, v in one[kind]} for kind in ("attrs", "constexprs"))
        assert one["signature"]["vectors_ptr"] == "*fp32"
        assert (constants["prior_ptr"], constants["vectors_column_stride"]) == (None, 1)
        assert "padded" not in attributes  # which is not specialised on
        seen.append((attributes["vectors_ptr"], attributes["width"], attributes["factor_ptr"]))
    assert sorted(seen) == sorted([(BY_16, BY_16, BY_16), ([], BY_16, BY_16), (BY_16, [], BY_16)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="writes down what is interpreted")
def test_launches_of_float8_are_compiled_where_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launches.FOLDER, str(tmp_path))
    factor = torch.empty(16)
    with launches.written_down(), np.errstate(all="ignore"):
        for dtype in (torch.float32, torch.float8_e4m3fn):
            row_norms(torch.ones(5, 16, dtype=dtype), factor=factor)
    kinds = {arch: [one.signature["vectors_ptr"] for one in launches.Launched(tmp_path)(arch)] for arch in (80, 90)}
    assert kinds[80] == ["*fp32"]
    assert sorted(kinds[90]) == ["*fp32", "*fp8e4nv"]


def operand(one: dict[str, Any]) -> str:
    """fp16 or fp32, of the first matrix of a product."""
    return next(iter(re.findall("fp16|fp32", next(iter(one["signature"].values())))))


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place to compile from; variables are as before afterwards."""
    if why := missing_tools():
        pytest.skip(why)
    for variable in ("TRITON_INTERPRET", "LTLOSS_TILES"):
        monkeypatch.setenv(variable, "")


@pytest.mark.compile
def test_what_the_tests_launch_compiles(compiling: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tests = [f"tests/kernels/{test}" for test in TESTS]
    assert launches.main([*tests, "--processes", "1", "--folder", str(tmp_path)]) == 0, capsys.readouterr().out
    found = written(tmp_path)
    files = (Path(ltloss_kernels.__file__).parent / "device").glob("*.py")
    functions = [one for file in files for one in ast.parse(file.read_text()).body if isinstance(one, ast.FunctionDef)]
    assert {one["kernel"] for one in found} == {one.name for one in functions if one.name.endswith("_kernel")}
    products = {(one["kernel"], operand(one)) for one in found if "BLOCK_DEPTH" in one["signature"]}
    # Float16 prototypes are copied to stay in range, and then a library product takes the copy.
    every = {kernel for kernel, _ in products}
    assert products == {(kernel, dtype) for kernel in every for dtype in ("fp16", "fp32")} - {
        ("prototype_gradient_kernel", "fp16")
    }


@pytest.mark.compile
def test_a_launch_that_only_the_interpreter_takes_is_found(
    compiling: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A product over 8 columns, which NumPy knows and no tensor core."""
    test = "tests/kernels/test_nearest_kernel.py::test_lowest_of_many_ties"
    assert launches.run([test], tmp_path / "all", 1) == 0
    line = next(one for one in written(tmp_path / "all") if one["kernel"] == "tile_candidates_kernel")
    depth = [list(line["signature"]).index("BLOCK_DEPTH")]
    line["constexprs"] = [[path, 8 if path == depth else value] for path, value in line["constexprs"]]
    (tmp_path / "0.jsonl").write_text(json.dumps(line))
    assert launches.refusals("sm_90", tmp_path, 1) == 1
    assert json.dumps(line) in capsys.readouterr().out
