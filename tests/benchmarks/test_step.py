"""The benchmark of the whole step refuses what is wrong, and judges its goals by the numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.peers import Shape
from benchmarks.step import __main__ as step
from benchmarks.step.cases import CASES, Goal, Training
from benchmarks.step.checks import check, check_way
from benchmarks.step.measure import GIB, Found, Work, compared, take_steps, verdict
from benchmarks.step.picture import SERIES, draw
from benchmarks.step.tables import headline_table, with_tables
from benchmarks.timing import write_rows

SMALL = Shape(8, 40, 16)


def _with(name: str, **options: Any) -> Any:
    case = CASES[name]
    return dataclasses.replace(case, options=(*case.options, *options.items()))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.provider == "ltloss"])
def test_every_case_of_ours_is_right_and_trains(name: str) -> None:
    assert check(CASES[name]) >= 0.0
    training = Training(CASES[name], SMALL)
    before = training.inputs.prototypes.detach().clone()
    losses = [float(training.step()) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert training.inputs.features.grad is not None
    assert bool((training.inputs.prototypes.detach() != before).any())


@pytest.mark.parametrize(
    "wrong",
    [
        _with("PrototypeAdamW", lr=1.0001e-3),
        _with("PrototypeAdamW", eps=1e-7),
        _with("PrototypeAdamW", betas=(0.9, 0.998)),
        _with("PrototypeSGD", momentum=0.899),
        _with("PrototypeAdagrad", eps=1e-4),
        _with("PrototypeAdamW, bfloat16 state", lr=1.01e-3),
        *(_with(f"Prototype{family}, bfloat16", rounding="nearest") for family in ("AdamW", "SGD", "Adagrad")),
        *(_with(f"Prototype{family}, float8", rounding="nearest") for family in ("AdamW", "Adagrad")),
    ],
)
def test_a_wrong_optimizer_is_not_timed(wrong: Any) -> None:
    with pytest.raises(RuntimeError, match="not timed"):
        check_way(wrong)


def test_a_peer_that_is_not_installed_is_left_out() -> None:
    here = [CASES["torch AdamW"], CASES["pytorch-metric-learning + torch AdamW"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "pytorch_metric_learning", None)
        patch.setitem(__import__("sys").modules, "pytorch_metric_learning.losses", None)
        assert list(step.checked(here)) == ["torch AdamW"]


def test_rows_of_fresh_processes(tmp_path: Path) -> None:
    names = ["torch AdamW", "PrototypeAdamW"]
    rows = step.whole_step(SMALL, names, rounds=1, steps=2, idle=100 << 20)
    assert [row["optimizer"] for row in rows] == names
    for row in rows:
        assert 0 < float(row["min_ms"]) <= float(row["median_ms"]) <= float(row["max_ms"])
        assert row["repeats"] == 2
        assert int(row["above_idle_mib"]) == int(row["peak_mib"]) - 100
        assert int(row["peak_mib"]) > 150, "torch itself is counted"
    assert (rows[0]["time_ratio"], rows[0]["memory_ratio"]) == ("1.000", "1.000")
    assert "time" in rows[1]["goal"]
    assert "memory" in rows[1]["goal"]
    write_rows(rows, tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text().count("\n") == 3


def test_a_loss_that_does_not_fall_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Training, "step", lambda self: torch.zeros(()))
    with pytest.raises(ValueError):
        take_steps(Work("PrototypeSGD", SMALL), 1, None)


def _found(medians: list[float], gib: float) -> Found:
    return Found(medians=medians, seconds=medians, peak=[int(gib * GIB)] * len(medians))


def test_goals_are_judged_by_the_numbers() -> None:
    assert verdict(0.70, 0.60, Goal(0.70, 0.60)).count("met") == 2
    assert verdict(0.71, 0.61, Goal(0.70, 0.60)).count("missed") == 2
    assert "time" not in verdict(2.0, 0.3, Goal(None, 0.35))
    assert verdict(2.0, 2.0, None) == ""
    works = [Work(name, SMALL) for name in ("torch AdamW", "torch AdamW, fused", "PrototypeAdamW")]
    # The machine became twice as slow in the second round: the ratios of a round do not see it.
    found = [_found([4.0, 8.0], 3.0), _found([3.0, 6.0], 2.5), _found([2.4, 4.8], 2.0)]
    rows: list[dict[str, Any]] = [{}, {}, {}]
    compared(works, found, rows)
    assert (rows[2]["time_ratio"], rows[2]["time_ratio_to_fused"], rows[2]["memory_ratio"]) == (
        "0.600",
        "0.800",
        "0.667",
    )
    assert rows[2]["goal"].startswith("time met")
    assert "memory missed" in rows[2]["goal"]


def _row(kind: str, name: str, classes: int, factor: int) -> dict[str, Any]:
    measured = {"median_ms": factor * classes, "peak_mib": classes // 9, "ns_per_class": 7.0, "note": "loss 3 -> 2"}
    return {"case": kind, "N": 8, "C": classes, "D": 4, "optimizer": name, **measured}


def test_the_pages_and_the_picture_show_every_case() -> None:
    rows = [_row("over classes", name, classes, 2) for name in SERIES for classes in (1000, 4000)]
    rows += [_row("whole step", name, 9000, factor) for factor, name in enumerate(CASES, 1)]
    rows += [_row("many classes", name, 10_000_000, 3) for name in step.TEN_MILLION]
    places = "".join(f"<!-- {name} --><!-- end of {name} -->\n" for name in ("whole step", "many classes"))
    text = with_tables(places, rows)
    assert all(f"| {name} |" in text for name in CASES)
    assert "| 10,000,000 | 7.0 |" in text
    svg = draw(rows)
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert all(label in svg for _, _, label in SERIES.values())
    assert draw(rows) == svg


def test_the_readme_compares_ours_with_theirs() -> None:
    about = {"time_ratio": "2.0", "threads": "2", "device": "a CPU"}
    rows = [{**_row("over classes", name, classes, 1), **about} for classes in (9000, 500) for name in SERIES]
    ours = next(row for row in rows if row["optimizer"] == "PrototypeAdamW")
    ours |= {"time_ratio": "0.5", "median_ms": "4250.8", "peak_mib": "1878"}
    lines = headline_table(rows).splitlines()
    assert "8 samples, 9,000 classes, D = 4, 2 cores of a CPU" in lines[0]
    assert lines[2].endswith("| 4.3 |  | 1.8 |")
    assert all(line.endswith("| 9.0 | 4.0 | 1.0 |") for line in lines[3:])
