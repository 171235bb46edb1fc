"""Benchmarks in parts: what was measured is kept, and every part of the CPU benchmark runs."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from benchmarks import loss_cpu, parts
from benchmarks.parts import Row
from benchmarks.peers import ON_CPU, Shape
from benchmarks.step import __main__ as step
from benchmarks.timing import read_rows, write_rows

_SHOWN = ("provider", {"note": "({})"})


def _told(part: str, note: str) -> Row:
    return {"case": part, "N": 2, "C": 3, "D": 4, "provider": "ours", "note": note}


def _telling(*names: str) -> dict[str, Callable[[], list[Row]]]:
    def told(name: str) -> list[Row]:
        return [_told(name, "new")]

    return {name: partial(told, name) for name in names}


def test_one_part_leaves_the_rows_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_rows([_told("second", "old"), _told("first", "old"), _told("renamed since", "old")], path)
    parts.measure(_telling("first", "second"), Namespace(only="second", output=path), {"load": "0.1"}, *_SHOWN)
    assert [(row["case"], row["note"], row["load"]) for row in read_rows(path)] == [
        ("first", "old", ""),
        ("second", "new", "0.1"),
    ]


def test_a_part_that_stops_keeps_what_was_measured_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> list[Row]:
        raise KeyboardInterrupt

    path = tmp_path / "rows.csv"
    with pytest.raises(KeyboardInterrupt):
        parts.measure({**_telling("first"), "second": interrupted}, Namespace(only=None, output=path), {}, *_SHOWN)
    assert [row["case"] for row in read_rows(path)] == ["first"]
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in shown] == [["first", "..."], ["ours", "(new)"], ["second", "..."]]


def test_the_parts_of_the_whole_step_have_their_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "over_classes", lambda *given: [{"case": "over classes", "optimizer": "PrototypeSGD"}])
    (row,) = step.parts_of({"PrototypeSGD": "1e-7"}, 1, 1, 0)["over classes"]()
    assert row["relative_error"] == "1e-7"


@pytest.mark.parametrize("name", loss_cpu.parts_of(1))
def test_each_part_of_the_cpu_benchmark_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On few classes, without what is compiled and without the fresh processes that find the memory."""
    monkeypatch.setattr(loss_cpu, "_peak", lambda measure, provider, shape: "1.5")
    monkeypatch.setattr(loss_cpu, "ON_CPU", [peer for peer in ON_CPU if not peer.compiled])
    for shape in ("TRAINING_STEP", "SUB_CENTERS", "REGULARIZER", "MILLION"):
        monkeypatch.setattr(loss_cpu, shape, Shape(64, 8000, 128))
    monkeypatch.setattr(loss_cpu, "NEAREST", Shape(0, 600, 16))
    monkeypatch.setattr(loss_cpu, "SCALING", [Shape(8, classes, 16) for classes in (5_000, 50_000)])
    rows = list(loss_cpu.parts_of(1)[name]())
    assert {row["case"] for row in rows} == {name}
    assert all(0 < float(row["min_ms"]) <= float(row["median_ms"]) <= float(row["max_ms"]) for row in rows)
    providers = [row["provider"] for row in rows]
    assert "ltloss" in providers or all("ltloss, " in one or "ArcFace, " in one for one in providers)
    assert all(float(row.get("relative_error", 0)) < 2e-4 for row in rows)
    with_goals = {provider for case, provider in loss_cpu.GOALS if case == name}
    judged = {
        row["provider"] for row in rows if re.fullmatch(r"ratio (met|missed) \(.*, goal <= .*\)", row.get("goal", ""))
    }
    assert judged == with_goals
