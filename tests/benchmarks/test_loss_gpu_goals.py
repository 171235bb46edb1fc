"""The goals for Hopper: which rows they judge, and how."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import pytest
import torch

from benchmarks.loss_gpu import __main__ as gpu
from benchmarks.loss_gpu import goals, kept, search, times, updates
from benchmarks.loss_gpu.goals import GOALS, Goal
from benchmarks.loss_gpu.measure import Device

WHOLE = [goal for goal in GOALS if goal.to]


def rows(value: float) -> list[goals.Row]:
    """All rows of ours and of what ours is divided by, as stage 2 writes them on a Hopper GPU."""
    steps = itertools.product((*gpu.MAIN, *gpu.OTHERS), times.OPERATIONS)
    cases = [*updates.update_cases(small=False), *kept.kept_cases(small=False), *search.search_cases(small=False)]
    heads = [{**times._head(shape, torch.bfloat16, "ltloss"), "phase": phase} for shape, phase in steps]
    heads += [{**times._head(one.shape, one.dtype, one.provider), "phase": one.phase} for one in cases]
    unit = {"ltloss": value}
    return [
        {**one, **{name: f"{unit.get(one['provider'], 1.0):.4f}" for name in ("median_ms", "share_of_P", "extra_mib")}}
        for one in heads
    ]


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def test_stage_2_measures_every_goal_but_the_counted_ones() -> None:
    lines = goals.judge(rows(1.0))
    assert len(lines) == len(set(lines)) == len([goal for goal in GOALS if goal.column])
    assert not [line for line in lines if "not measured" in line]
    assert all("not measured" in line for line in goals.judge([]))


@pytest.mark.parametrize(("value", "met"), [(0.01, "most"), (1000.0, "least")])
def test_shares_are_at_least_and_everything_else_is_at_most(value: float, met: str) -> None:
    measured = rows(value)
    lines = goals.judge(measured)
    for line in lines:
        assert (" met (" in line) == (("share of P" in line) == (met == "least")), line
    judged = [row["goal"] for row in measured if "goal" in row]
    assert sorted(text for goal in judged for text in goal.split("; ")) == sorted(
        line.partition(": ")[2].partition(": ")[2] for line in lines
    )


def test_a_ratio_waits_for_its_other_half() -> None:
    (ours, *_), theirs = (
        [row for row in rows(0.45) if row["phase"] == "whole step" and row["provider"] == provider]
        for provider in ("ltloss", WHOLE[0].to)
    )
    assert all("not measured" in line for line in goals.judge([ours]))
    assert "goal" not in ours
    goals.judge([ours, *theirs])
    assert ours["goal"] == "time met (0.45, goal <= 0.5); memory missed (0.45, goal <= 0.4)"


def test_stage_2_says_which_goals_are_met(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = times.TINY[-1]
    monkeypatch.setattr(
        goals, "GOALS", (Goal("forward", shape, "share_of_P", 1e9), Goal("step", shape, "median_ms", 1e9))
    )
    command = ["--device", "cpu", "--minutes", "9", "--repeats", "1", "--stage", "times", "--provider", "ltloss"]
    command += ["--shape", str(shape), "--output", str(tmp_path / "rows.csv")]
    assert gpu.main(command) == 0
    assert "goal:" not in capsys.readouterr().out, "they are for Hopper"
    monkeypatch.setattr(Device, "is_hopper", True)
    assert gpu.main(command) == 0
    shown, found = capsys.readouterr().out, (tmp_path / "rows.txt").read_text()
    assert f"goal: forward at {shape}: share of P missed (" in found
    assert f"goal: step at {shape}: ms met (" in found
    assert found in shown
    with (tmp_path / "rows.csv").open(newline="") as file:
        written = {row["phase"]: row["goal"] for row in csv.DictReader(file) if row["goal"]}
    assert sorted(written) == ["forward", "step"]
    assert written["step"].startswith("ms met (")
