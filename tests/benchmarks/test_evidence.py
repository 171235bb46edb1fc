"""The page of evidence is made from the CSV files and the command lines of its studies, and from nothing else."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from helpers.refusals import missing, refused

from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence.__main__ import (
    START_HERE,
    STUDIES,
    Study,
    best_at_each_scale,
    read_rows,
    section,
    start_here,
    with_and_without_margin,
    with_studies,
)
from benchmarks.evidence.pages import markdown_table, renewed
from benchmarks.pictures import ROOT
from ltloss import LongTailLoss
from ltloss.training.model.registry import build_loss

pytestmark = pytest.mark.slow


def test_every_advice_rests_on_two_rows_of_a_study_that_was_run() -> None:
    shown = start_here((ROOT / "docs" / "choosing.md").read_text(encoding="utf-8"))
    assert "not measured yet" not in shown
    for advice in START_HERE:
        rows = read_rows(evidence.RESULTS / f"evidence_{advice.study}.csv")
        accuracy = {
            key: [float(row["last_accuracy"]) for row in rows if (row["method"], row["variant"]) == key]
            for key in (advice.row, advice.against)
        }
        better, worse = (sum(values) / len(values) for values in accuracy.values())
        assert better > worse, advice.situation
        assert f"**{100 * better:.2f}" in shown
        assert f"; {advice.called} {100 * worse:.2f}" in shown


def test_the_advice_for_few_classes_is_what_measured_best() -> None:
    few = next(advice for advice in START_HERE if advice.situation.startswith("few classes"))
    rows = [row for row in read_rows(evidence.RESULTS / f"evidence_{few.study}.csv") if not row["variant"]]
    accuracy: dict[str, list[float]] = {}
    for row in rows:
        accuracy.setdefault(row["method"], []).append(float(row["last_accuracy"]))
    assert max(accuracy, key=lambda name: sum(accuracy[name]) / len(accuracy[name])) == few.row[0] == "balanced"
    assert "softmax" in few.use


def test_the_loss_of_an_advice_is_the_one_that_was_measured() -> None:
    counts = [9, 3, 1]
    for advice in START_HERE:
        if "LongTailLoss" not in advice.use:
            continue
        call = advice.use.split("`")[1].replace("counts, D", "[9, 3, 1], 8")
        advised = eval(call, {"LongTailLoss": LongTailLoss})
        pairs = (pair.split("=") for pair in advice.row[1].split(", "))
        values = {name: json.loads(value.lower()) for name, value in pairs}
        measured = build_loss("long-tail-prior", counts, 8, {"scale": 30.0, **values})
        assert repr(advised) == repr(measured)


def test_advice_without_results_is_said_to_be_unmeasured(tmp_path: Path) -> None:
    page = start_here("<!-- start here -->\n<!-- end of start here -->", tmp_path)
    assert page.count("not measured yet") == len(START_HERE)


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Study, Path]:
    """A study on the digits that takes seconds, and where its results go."""
    common = "--recipe small --imbalance 10 --epochs 1 --crop-pad 1 --limit-per-class 16 --limit-test 40 --device cpu"
    commands = (f"{common} --losses ce --seeds 2 --tune", f"{common} --losses long-tail-prior --seeds 1 --vary tau=0,1")
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    return Study("digits", "Digits", "few of them.", commands), tmp_path


def test_a_study_is_run_and_shown_with_its_commands(digits: tuple[Study, Path]) -> None:
    study, results = digits
    evidence.run("tiny", study, Path(), results / "kept", jobs=1)
    rows, trials = (read_rows(results / name) for name in ("evidence_tiny.csv", "evidence_tiny_tuning.csv"))
    assert [(row["command"], row["method"], row["variant"], row["seed"]) for row in rows] == [
        ("0", "ce", "", "0"),
        ("0", "ce", "", "1"),
        ("1", "long-tail-prior", "tau=0", "0"),
        ("1", "long-tail-prior", "tau=1", "0"),
    ]
    assert len(trials) >= 5
    shown = section(study, rows, trials)
    for command in study.commands:
        assert f"ltloss compare --data digits {command} --out runs/digits\n" in shown
    (chosen,) = [row["values"] for row in trials if row["chosen"] == "1"]
    assert f"| cross-entropy | lr={json.loads(chosen)['lr']:g}, weight_decay=" in shown
    mean = sum(100 * float(row["last_accuracy"]) for row in rows[:2]) / 2
    assert f"| cross-entropy | 2 | {mean:.2f} ± " in shown
    last = 100 * float(rows[3]["last_accuracy"])
    assert f"| long-tail margins with log prior (tau=1) | 1 | {last:.2f} | none |" in shown
    hours = sum(float(row["seconds"]) for row in [*rows, *trials]) / 3600
    assert f"took {hours:.1f} core hours on cpu, torch " in shown
    before = {path.name: path.stat().st_mtime_ns for path in (results / "kept" / "tiny" / "runs").iterdir()}
    evidence.run("tiny", study, Path(), results / "kept", jobs=1)
    assert {path.name: path.stat().st_mtime_ns for path in (results / "kept" / "tiny" / "runs").iterdir()} == before
    assert read_rows(results / "evidence_tiny.csv") == rows


def trial(method: str, share: str, **values: float) -> dict[str, str]:
    return {"method": method, "values": json.dumps(values), "balanced_accuracy": share}


def test_trials_that_differ_in_the_margin_alone_stand_side_by_side() -> None:
    trials = [
        trial("logit-adjusted", "0.6", lr=0.1, scale=16.0, tau=1.0),
        trial("logit-adjusted", "0.7", lr=0.2, scale=16.0, tau=1.0),
        trial("logit-adjusted", "0.9", lr=0.1, scale=16.0, tau=2.0),
        trial("long-tail-prior", "0.65", lr=0.1, scale=16.0, margin=0.5),
        trial("long-tail-prior", "", lr=0.2, scale=16.0, margin=0.5),
        trial("long-tail-prior", "0.9", lr=0.1, scale=16.0, margin=1.0),
        trial("long-tail-prior", "0.5", lr=0.1, scale=32.0, margin=0.5),
        trial("ce", "0.5", lr=0.1, weight_decay=0.1),
    ]
    assert with_and_without_margin(trials)[1:] == [["0.1", "16", "60.00", "65.00"], ["0.2", "16", "70.00", "none"]]
    without_rate = [
        trial("logit-adjusted", "0.6", scale=16.0, tau=1.0),
        trial("long-tail-prior", "0.65", scale=16.0, margin=0.5),
    ]
    assert with_and_without_margin(without_rate)[1:] == [["as given", "16", "60.00", "65.00"]]


def test_the_best_trial_of_each_scale_is_shown_whatever_its_other_values() -> None:
    trials = [
        trial("cosine", "0.5", scale=8.0, lr=0.1),
        trial("cosine", "0.7", scale=8.0, lr=0.4),
        trial("cosine", "0.6", scale=8.0, lr=0.2),
        trial("cosine", "", scale=16.0, lr=0.2),
        trial("ldam", "0.4", scale=16.0, lr=0.2),
        trial("ce", "0.9", lr=0.2),
    ]
    assert best_at_each_scale(trials) == [
        ["method", "scale 8", "scale 16"],
        ["cosine softmax", "70.00", "none"],
        ["LDAM", "none", "40.00"],
    ]


def test_a_study_that_fails_says_so(digits: tuple[Study, Path], capsys: pytest.CaptureFixture[str]) -> None:
    study = Study("digits", "Digits", "few of them.", (f"{digits[0].commands[0]} --losses nonsense",))
    with refused("bad", "1", error=SystemExit):
        evidence.run("bad", study, Path(), digits[1] / "kept", jobs=1)
    assert not missing(capsys.readouterr().err, "--losses", "nonsense")
    assert not (digits[1] / "evidence_bad.csv").exists()


@pytest.mark.parametrize("name", STUDIES)
def test_the_commands_of_the_studies_can_be_parsed(name: str) -> None:
    from ltloss.cli.command import build_parser
    from ltloss.training.comparison.grid import ComparisonSpec
    from ltloss.training.run.settings import SETTINGS

    for command in STUDIES[name].commands:
        line = shlex.split(f"compare --data digits --device cpu --out out {command}")
        options = vars(build_parser().parse_args(line))
        given = {key: value for key, value in options.items() if key in SETTINGS}
        names = ("recipe", "seeds", "tune", "tune_seeds")
        plan = ComparisonSpec(
            given,
            tuple(options["losses"]),
            vary=dict(options["vary"]),
            validation_per_class=1,
            **{key: options[key] for key in names},
        )
        assert plan.settings["imbalance"] > 1


def test_a_study_without_results_is_said_to_be_unmeasured(tmp_path: Path) -> None:
    marks = "\n".join(f"<!-- {name} -->\nold\n<!-- end of {name} -->" for name in STUDIES)
    page = with_studies(marks, tmp_path)
    assert page.count("Not measured yet.") == len(STUDIES)
    assert "old" not in page


def test_marks_must_be_there_once() -> None:
    assert (
        renewed("a\n<!-- x -->b<!-- end of x -->c", "x", r"new \1") == "a\n<!-- x -->\n\nnew \\1\n\n<!-- end of x -->c"
    )
    with refused("'x'", "0"):
        renewed("nothing", "x", "new")
    assert markdown_table([["a", "b"], ["1|2", "3"]]) == "| a | b |\n| --- | --- |\n| 1\\|2 | 3 |"
