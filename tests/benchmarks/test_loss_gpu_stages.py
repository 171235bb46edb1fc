"""The stages of the GPU benchmark: each alone, and none stopped by what happens in another process."""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.refusals import missing
from ltloss_kernels.config import choices

from benchmarks.loss_gpu import __main__ as gpu
from benchmarks.loss_gpu import apart, correctness, search, system, tiles, times, updates
from benchmarks.loss_gpu.measure import Deadline, Device
from benchmarks.peers import Shape
from ltloss import use_backend

pytestmark = pytest.mark.slow

TINY = Shape(5, 33, 8)


@pytest.fixture(autouse=True)
def as_users_run_it(default_algorithms: None, sizes_for_a_cpu: None) -> None:
    """Peers use operators that have no deterministic variant."""


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


SPOILT = """
import os, time

def illegal_access(device):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def crash(device):
    os._exit(139)

def fine(device):
    return ""

def off(device):
    return "differs"

def hang(device):
    time.sleep(3600)

def case(number):
    if number == 2:
        illegal_access(None)
    if number == 3:
        crash(None)
    return f"{os.environ['SPOILT']} {number}"

def hang_in_a_bench(bench, shape):
    bench.add([{"note": "begun"}])
    hang(None)

def case_that_hangs(number):
    if number in (0, 1):
        hang(None)
    return number
"""


@pytest.fixture
def spoilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Properties that fail, in a file that a process of its own can import."""
    (tmp_path / "spoilt_properties.py").write_text(SPOILT)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("spoilt_properties")


def test_a_crash_in_one_case_costs_that_case(spoilt: ModuleType) -> None:
    found = dict(apart.spread(spoilt.case, range(7), "cpu", Deadline(600.0), 2, {"SPOILT": "yes"}))
    assert sorted(found) == list(range(7))
    assert {number: answer.value for number, answer in found.items() if not answer.problem} == {
        number: f"yes {number}" for number in (0, 1, 4, 5, 6)
    }
    assert not missing(found[2].problem, "RuntimeError", "illegal memory access")
    assert not missing(found[3].problem, "died")


@pytest.mark.parametrize("patience", [2.0, 3600.0])
def test_a_case_that_hangs_costs_that_case(
    patience: float, spoilt: ModuleType, monkeypatch: pytest.MonkeyPatch, ends: Callable[[int], bool]
) -> None:
    """Its process is ended, the lane goes on; too late for that, it is told apart from one that had its time."""
    monkeypatch.setattr(apart, "PATIENCE", patience)
    monkeypatch.setattr(apart, "GRACE", 1.0)
    start = time.monotonic()
    deadline = Deadline(600.0 if patience < 600 else 5.0)
    found = dict(apart.spread(spoilt.case_that_hangs, range(4), "cpu", deadline, 2))
    assert time.monotonic() - start < 90
    problems = {number: (answer.problem, answer.late) for number, answer in found.items() if answer.problem}
    if patience < 600:
        assert problems == dict.fromkeys((0, 1), ("hangs: no answer after 2 s", False))
        assert [found[number].value for number in (2, 3)] == [2, 3]
    else:
        assert sorted(problems) == [0, 1] == sorted(found)
        assert all(re.fullmatch(r"cut off after \d+ s", problem) and late for problem, late in problems.values())
    assert all(process.pid is not None and ends(process.pid) for process in multiprocessing.active_children())


def test_what_lies_behind_the_deadline_is_left_out() -> None:
    assert list(apart.spread(print, range(3), "cpu", Deadline(0.0), 0)) == []


def test_the_tiles_are_ranked_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ltloss.tools import tune_tiles

    monkeypatch.setattr(tune_tiles, "CANDIDATES", (tune_tiles.tiles.Tile(16, 16, 32, 4, 2),))
    state = times.Bench(Device("cpu"), Deadline(600.0), tmp_path / "rows.csv", repeats=2, dtype=torch.float32)
    with use_backend("triton"):
        tiles.measure(state, [TINY], tmp_path / "tiles.csv")
    rows = read(tmp_path / "tiles.csv")
    assert {row["what"] for row in rows} == {"forward", "gradient", "step"}
    assert [row["choice"] for row in rows if row["what"] == "step"] == ["today", *choices.NAMES]
    lines = [line for line in (tmp_path / "rows.txt").read_text().splitlines() if " = Tile(" in line]
    assert len(lines) == 2
    for line in lines:
        table, _, tile = line.partition("  #")[0].partition(" = ")
        assert re.fullmatch(r"_(FORWARD_HALF|GRADIENT_HALF|TF32|FLOAT32)\[(80|90|100)\]", table)
        assert tune_tiles.tiles.Tile(*map(int, re.findall(r"\d+", tile))).rows in (16, 64)


def test_a_candidate_that_fails_costs_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile, or an untried choice, may end its process, compute something else, or find too little time."""
    from ltloss.tools import tune_tiles

    right, good, bad = tune_tiles.rank, tune_tiles.tiles.Tile(16, 16, 32, 4, 2), tune_tiles.tiles.Tile(16, 32, 32, 4, 2)

    def rank(*given: Any) -> list[tune_tiles.Timing]:
        if bad in tune_tiles.CANDIDATES:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return right(*given)

    @contextlib.contextmanager
    def trying(name: str) -> Iterator[None]:
        if name == "one wave":
            raise RuntimeError("no such kernel")
        yield

    monkeypatch.setattr(tune_tiles, "CANDIDATES", (bad, good))
    monkeypatch.setattr(tune_tiles, "rank", rank)
    monkeypatch.setattr(choices, "trying", trying)
    state = times.Bench(Device("cpu"), Deadline(600.0), tmp_path / "rows.csv", repeats=2, dtype=torch.float32)
    with use_backend("triton"):
        tiles.measure(state, [TINY], tmp_path / "tiles.csv")
    rows = read(tmp_path / "tiles.csv")
    assert state.failed
    assert [row["choice"] for row in rows if row["what"] == "step"] == ["one wave", "today", *choices.NAMES[1:]]
    for kernel in ("forward", "gradient"):
        problem, *ranked = (row for row in rows if row["what"] == kernel)
        assert (problem["choice"], problem["note"][:12]) == ("16x32x32x4x2", "RuntimeError")
        assert "16x16x16x4x2" in {row["choice"] for row in ranked}, "the next one is ranked, with half the depth"
        assert [row["note"] for row in ranked if row["note"]] == ["today"]


def test_tiles_without_time_are_left_out_and_are_no_mistake(tmp_path: Path) -> None:
    state = times.Bench(Device("cpu"), Deadline(0.0), None)
    tiles.measure(state, [TINY], None)
    assert [sentence.split(":")[1] for sentence in state.findings] == [" left out for time"] * 3
    assert not state.failed


def test_a_stage_can_be_run_alone(few_comparisons: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--device", "cpu", "--quick", "--minutes", "9", "--output", str(tmp_path / "rows.csv")]
    assert gpu.main([*command, "--stage", "correctness"]) == 0
    assert not (tmp_path / "rows.csv").exists(), "nothing was timed"
    cases = read(tmp_path / "rows-correctness.csv")
    assert len(cases) == len(list(correctness.cases(quick=True)))
    assert not any(row["problem"] for row in cases)
    capsys.readouterr()
    one = ["--provider", "ltloss", "--shape", "5x33x8", "--repeats", "1"]
    assert gpu.main([*command, "--stage", "times", *one]) == 0
    assert "comparisons with float64" not in capsys.readouterr().out
    assert read(tmp_path / "rows.csv")


def test_a_shape_at_which_ours_hangs_costs_that_shape(spoilt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one is timed, in another process, and the rows are those of this run."""
    bench = times.Bench(Device("cpu"), Deadline(600.0), None, repeats=2)
    bench.stamp["failed_properties"] = "off"
    worker = apart.Worker("cpu", apart=True)
    head = times._head(TINY, bench.dtype, "ltloss")
    with monkeypatch.context() as patched:
        patched.setattr(apart, "PATIENCE", 2.0)
        times.apart(bench, worker, head, bench.deadline, spoilt.hang_in_a_bench, TINY)
    assert [row["note"] for row in bench.rows] == ["hangs: no answer after 2 s"]
    assert bench.failed
    given = TINY, [one for one in bench.providers if one.name == "ltloss"], 0.3
    times.apart(bench, worker, head, bench.deadline, functools.partial(times.time_shape, host=True), *given)
    for case in (*updates.update_cases(small=True), *search.search_cases(small=True)):
        if case.provider == "ltloss":
            times.apart(bench, worker, head, bench.deadline, times.time_search, case)
    worker.close()
    assert [row["phase"] for row in bench.rows[1:4]] == [*times.OPERATIONS]
    assert all(row["median_ms"] for row in bench.rows[1:]), [row["note"] for row in bench.rows]
    assert {row["failed_properties"] for row in bench.rows} == {"off"}


def test_a_process_that_a_property_ends_takes_no_other_along(spoilt: ModuleType) -> None:
    todo = [spoilt.illegal_access, spoilt.crash, spoilt.fine, spoilt.off]
    told: list[str] = []
    found = system.check_all(Device("cpu"), Deadline(600.0), todo, 1, told.append)
    assert (found.compared, found.left_out) == (4, 0)
    assert list(found.wrong) == ["illegal access", "crash", "off"]
    assert told == [f"WRONG: {name}: {problem}" for name, problem in found.wrong.items()]
    assert found.wrong["illegal access"].startswith("RuntimeError: CUDA error: an illegal memory access")
    assert found.wrong["crash"] == "the process died (a crash, or out of memory)"
    assert found.wrong["off"] == "differs"


def test_times_are_measured_although_a_property_fails_and_say_so(
    few_comparisons: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    spoilt: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(system, "ANYWHERE", (spoilt.off, spoilt.fine))
    command = ["--device", "cpu", "--quick", "--minutes", "9", "--shape", "5x33x8", "--provider", "ltloss"]
    assert gpu.main([*command, "--repeats", "1", "--output", str(tmp_path / "rows.csv")]) == 1
    rows = read(tmp_path / "rows.csv")
    assert any(row["median_ms"] for row in rows)
    assert {row["failed_properties"] for row in rows} == {"off"}
    assert "although it fails: off" in capsys.readouterr().out
    assert "WRONG: off: differs" in (tmp_path / "rows.txt").read_text()
