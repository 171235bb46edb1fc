from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cli_errors import fails
from helpers.refusals import missing, refused, warned
from helpers.small_run import HOSTILE
from helpers.toys import toy_images

import ltloss.training.run.prepare
from ltloss._files import temporary
from ltloss.cli.command import main
from ltloss.errors import UserError
from ltloss.training import compare
from ltloss.training.comparison.climb import edges
from ltloss.training.comparison.jobs import Job, validation_indices
from ltloss.training.comparison.methods import search_space
from ltloss.training.comparison.tables import Comparison, Trial, numbers, percents, summary
from ltloss.training.measure.class_groups import Thresholds
from ltloss.training.measure.evaluate import measure
from ltloss.training.pages.comparison import write_page

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"epochs": 2, "batch_size": 16, "embedding_size": 8, "device": "cpu", "imbalance": 4.0}
_TIMES = ("seconds", "seconds_per_epoch")


def small(data: Path, **changes: Any) -> dict[str, Any]:
    return {**SMALL, "data": str(data), **changes}


def rows_of(out: Path, name: str = "results.csv") -> list[dict[str, str]]:
    """The rows of a CSV file without the times."""
    with (out / name).open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in _TIMES} for row in csv.DictReader(file)]


def files_of(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "runs").glob("*.json")}


@pytest.fixture(scope="module")
def compared(toy_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Two methods and three second stages, two seeds, in this process. Do not change its files."""
    out = tmp_path_factory.mktemp("compare") / "one"
    methods = ["ce", "long-tail-prior", "post-hoc", "tau-norm", "crt"]
    return compare(out, small(toy_npz, many_threshold=15, few_threshold=6), methods, seeds=2, quiet=True)


def test_rows_say_what_was_measured(compared: Comparison) -> None:
    rows = rows_of(compared.out)
    published = Path(__file__).parents[3] / "benchmarks" / "results" / "evidence_omniglot.csv"
    header, expected = (next(csv.reader(path.open())) for path in (compared.out / "results.csv", published))
    assert header == expected[1:]  # the first is the number of the command
    assert [(row["method"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("ce", "long-tail-prior", "post-hoc", "tau-norm", "crt") for seed in "01"
    ]
    by_method = {row["method"]: row for row in rows if row["seed"] == "0"}
    assert by_method["ce"]["pictures_train"] == str(20 + 10 + 5)
    assert (by_method["ce"]["last_epoch"], by_method["ce"]["best_epoch"] in "12") == ("2", True)
    assert by_method["crt"]["last_epoch"] == "10"
    assert (by_method["post-hoc"]["best_epoch"], by_method["post-hoc"]["best_accuracy"]) == ("", "")
    assert all(float(row["best_accuracy"]) >= float(row["last_accuracy"]) for row in rows if row["best_epoch"])
    assert all(0 < float(row["angle_min_degrees"]) <= float(row["angle_mean_degrees"]) <= 180 for row in rows)
    few, many = (float(by_method["ce"][f"last_{name}"]) for name in ("few", "many"))
    medium, balanced = (float(by_method["ce"][f"last_{name}"]) for name in ("medium", "balanced_accuracy"))
    assert balanced == pytest.approx((few + medium + many) / 3)  # one class in each group


def test_second_stages_begin_with_the_network_of_the_first(compared: Comparison) -> None:
    networks = sorted(path.stem for path in (compared.out / "models").iterdir())
    first = [path.stem for path in (compared.out / "runs").glob("softmax-*.json")]
    assert len(networks) == 2
    assert set(networks) < set(first)
    by_method = {row["method"]: row for row in rows_of(compared.out) if row["seed"] == "0"}
    assert by_method["post-hoc"]["angle_mean_degrees"] == by_method["ce"]["angle_mean_degrees"]
    assert by_method["crt"]["angle_mean_degrees"] != by_method["ce"]["angle_mean_degrees"]


def test_two_jobs_at_a_time_give_the_numbers_of_one(compared: Comparison, toy_npz: Path, tmp_path: Path) -> None:
    methods = ["ce", "long-tail-prior", "post-hoc", "tau-norm", "crt"]
    compare(tmp_path, small(toy_npz, many_threshold=15, few_threshold=6), methods, seeds=2, jobs=2, quiet=True)
    assert rows_of(tmp_path) == rows_of(compared.out)


def test_a_killed_comparison_continues_where_it_was(compared: Comparison, toy_npz: Path, tmp_path: Path) -> None:
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    line = ["compare", "--data", str(toy_npz), "--losses", "ce,long-tail-prior", "--seeds", "2", "--jobs", "1"]
    line += ["--quiet", *settings, "--many-threshold", "15", "--few-threshold", "6", "--out", str(tmp_path / "cut")]
    process = subprocess.Popen([sys.executable, "-m", "ltloss", *line], env=os.environ)
    while not files_of(tmp_path / "cut") and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 1 <= len(done := files_of(tmp_path / "cut")) < 4
    for leftover in ("runs/half.json", "models/half.json", "compare.json"):
        temporary(tmp_path / "cut" / leftover).write_text("{")
    assert main(line) == 0
    now = files_of(tmp_path / "cut")
    assert len(now) == 4
    assert {name: now[name] for name in done} == done  # not computed again
    whole = [row for row in rows_of(compared.out) if row["method"] in ("ce", "long-tail-prior")]
    assert rows_of(tmp_path / "cut") == whole
    assert not list((tmp_path / "cut").rglob(".*"))


def test_a_damaged_result_is_computed_again_and_a_method_can_join(toy_npz: Path, tmp_path: Path) -> None:
    given = small(toy_npz, epochs=1)
    compare(tmp_path, given, ["ce"], seeds=1, quiet=True)
    before = rows_of(tmp_path)
    (path,) = (tmp_path / "runs").iterdir()
    path.write_text('{"last"')
    compare(tmp_path, given, ["ce", "tau-norm"], seeds=1, quiet=True)  # which needs the network, not kept before
    assert rows_of(tmp_path)[:1] == before
    assert [row["method"] for row in rows_of(tmp_path)] == ["ce", "tau-norm"]


def test_one_training_has_one_key_however_its_numbers_are_written() -> None:
    def key(second_stage: dict[str, Any] | None = None, **options: Any) -> str:
        settings = {"data": "digits", "loss": "long-tail", "seed": 0, "loss_options": options}
        return Job(settings, "images", second_stage=second_stage or {}).key

    assert key(min_angle_weight=0, tau=1) == key(min_angle_weight=0.0, tau=1.0)
    assert key({"norm_power": 1}) == key({"norm_power": 1.0})
    different = [key(), key(tau=1), key(tau=0), key(flag=True), key(flag=1), key({"tau": 1})]
    assert len(set(different)) == len(different)


def test_the_name_of_version_0_1_is_taken_with_a_warning(toy_npz: Path, tmp_path: Path) -> None:
    given = small(toy_npz, epochs=1)
    new = compare(tmp_path, given, ["long-tail-prior"], seeds=1, quiet=True)
    with warned("recommended", "long-tail-prior") as caught:
        old = compare(tmp_path, given, ["recommended", "long-tail-prior"], seeds=1, quiet=True)
    assert caught[0].filename == __file__
    assert old.runs == new.runs
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_other_groups_need_no_training(toy_npz: Path, tmp_path: Path) -> None:
    for many, few, empty in ((15, 6, set()), (100, 0, {"many", "few"})):
        found = compare(
            tmp_path, small(toy_npz, epochs=1, many_threshold=many, few_threshold=few), ["ce"], seeds=1, quiet=True
        )
        row = found.rows[0]
        assert {name for name in ("many", "medium", "few") if row[f"last_{name}"] is None} == empty
    assert len(files_of(tmp_path)) == 1
    assert row["last_medium"] == row["last_balanced_accuracy"]
    lines = found.to_text().splitlines()
    assert lines[0].split("  ")[0] == "method"
    assert lines[1].split().count("none") == 2
    page = found.page.read_text()
    assert "medium (0-100)" in page
    assert page.count("<svg") == 2  # of all images, and of the one group that has classes
    assert "Nothing was measured of: many (&gt;100), few (&lt;0)." in page


def test_tuning_never_reads_the_test_split(toy_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = ltloss.training.run.prepare.load_data
    read: list[str] = []

    def watched(spec: str, *, split: str, **options: Any) -> Any:
        read.append(split)
        if split != "train":
            raise UserError("the test split is poison")
        return load(spec, split=split, **options)

    monkeypatch.setattr(ltloss.training.run.prepare, "load_data", watched)
    given, methods = small(toy_npz, epochs=1), ["ce", "arcface", "post-hoc"]
    with refused("poison", error=UserError):
        compare(tmp_path / "out", given, methods, seeds=1, tune=True, quiet=True)
    assert set(read[:-1]) == {"train"}
    trials = files_of(tmp_path / "out")
    assert len(trials) >= 3 * 5  # all of them were done by then: along two axes that is the least
    monkeypatch.undo()
    found = compare(tmp_path / "out", given, methods, seeds=1, tune=True, quiet=True)
    assert len(found.trials) == len(trials)
    assert {name: time for name, time in files_of(tmp_path / "out").items() if name in trials} == trials


def test_other_test_images_change_no_choice(toy_npz: Path, tmp_path: Path) -> None:
    with np.load(toy_npz) as archive:
        arrays = dict(archive)
    poison = {**arrays, "x_test": arrays["x_test"][:, ::-1] ^ 255, "y_test": 2 - arrays["y_test"]}
    np.savez(tmp_path / "poison.npz", **poison)
    tuning = []
    for data in (toy_npz, tmp_path / "poison.npz"):
        out = tmp_path / data.stem
        compare(out, small(data, epochs=6), ["cosface"], seeds=1, tune=True, validation_per_class=4, quiet=True)
        tuning.append(rows_of(out, "tuning.csv"))
    assert tuning[0] == tuning[1]
    assert len({row["balanced_accuracy"] for row in tuning[0]}) > 1
    errors = [float(rows_of(tmp_path / name)[0]["last_calibration_error"]) for name in ("toy", "poison")]
    assert errors[0] != errors[1]  # while the results on the test split are others


def test_the_chosen_trial_is_the_best_and_is_what_is_trained(toy_npz: Path, tmp_path: Path) -> None:
    found = compare(tmp_path, small(toy_npz), ["ldam"], seeds=1, tune=True, tune_seeds=2, quiet=True)
    (best,) = [trial for trial in found.trials if trial.chosen]
    accuracies = [trial.accuracy for trial in found.trials if trial.accuracy is not None]
    assert len(accuracies) == len({tuple(trial.values.items()) for trial in found.trials}) >= 5
    assert best.accuracy == max(accuracies)
    assert best is next(trial for trial in found.trials if trial.accuracy == best.accuracy)  # the first of equals
    space = search_space("ldam", found.settings)
    assert best.edges == edges(space, best.values)
    assert all(trial.edges == {} for trial in found.trials if trial is not best)
    results = [json.loads(path.read_text()) for path in (tmp_path / "runs").iterdir()]
    final = [result for result in results if result["validation_per_class"] is None]
    assert [{name: r["settings"][name] for name in ("scale", "margin", "lr")} for r in final] == [best.values]
    held = [result for result in results if result["validation_per_class"]]
    assert {(tuple(r["class_counts"]), tuple(r["pictures"])) for r in held} == {((16, 8, 4), (28, 12))}  # 4 of 20 held
    assert {len(r["history"]) for r in held} == {2}
    assert all(r["history"][0]["test_accuracy"] is None for r in held)  # only the last epoch is measured


def test_a_choice_at_the_end_of_its_list_is_said_in_table_and_page(toy_npz: Path, tmp_path: Path) -> None:
    found = compare(tmp_path, {**small(toy_npz), "lr": 0.1}, ["cosine"], seeds=1, tune=True, quiet=True)
    (best,) = [trial for trial in found.trials if trial.chosen]
    told = replace(found, trials=(replace(best, values={"scale": 64.0}, edges={"scale": "last"}),))
    assert "cosine: scale=64 (scale the last of its list)" in told.to_text()
    assert "scale=64 (scale the last of its list)" in write_page(told).read_text()
    middle = replace(found, trials=(replace(best, values={"scale": 16.0}, edges={}),))
    assert "of its list" not in middle.to_text() + write_page(middle).read_text()


def test_held_out_images_come_from_classes_that_can_spare_them() -> None:
    labels = np.repeat([0, 1, 2, 3], [40, 7, 3, 1])
    held = validation_indices(labels, 5, seed=0)
    assert np.bincount(labels[held], minlength=4).tolist() == [5, 3, 1, 0]
    assert np.array_equal(held, validation_indices(labels, 5, seed=0))
    assert not np.array_equal(held, validation_indices(labels, 5, seed=1))
    with pytest.raises(UserError):
        validation_indices(np.arange(3), 1, seed=0)


def test_varied_settings_are_rows_of_their_own(toy_npz: Path, tmp_path: Path) -> None:
    varied = {"min_angle_weight": [0, 0.1], "mixup": [0.4]}
    found = compare(tmp_path, small(toy_npz, epochs=1), ["long-tail-prior"], seeds=1, vary=varied, quiet=True)
    assert [row["variant"] for row in found.rows] == [
        "min_angle_weight=0, mixup=0.4",
        "min_angle_weight=0.1, mixup=0.4",
    ]
    assert found.rows[0]["last_accuracy"] is not None
    assert len({row["angle_mean_degrees"] for row in found.rows}) == 2


def test_a_training_that_diverges_is_a_row_and_no_choice(toy_npz: Path, tmp_path: Path) -> None:
    given = small(toy_npz, epochs=1)
    found = compare(tmp_path, given, ["ce"], seeds=1, vary={"lr": [0.1, 1e30]}, quiet=True)
    good, bad = found.rows
    assert (good["failed"], bad["last_accuracy"]) == (None, None)
    assert bad["failed"]
    assert [line.count("(1 diverged)") for line in found.to_text().splitlines()] == [0, 0, 1]
    assert "Trainings that diverged" in found.page.read_text()
    stages = compare(tmp_path, given, ["tau-norm"], seeds=1, vary={"lr": [1e30]}, quiet=True)
    assert bad["failed"] in stages.rows[0]["failed"]
    with refused("ce", "weight_decay", error=UserError):
        compare(tmp_path / "tuned", {**given, "lr": 1e30}, ["ce"], seeds=1, tune=True, quiet=True)


def test_the_page_shows_hostile_values_as_text(compared: Comparison, tmp_path: Path) -> None:
    (tmp_path / "<b>out").mkdir()
    hostile = {"chosen": {"scale": HOSTILE[0]}, "variant": {"$x$ <i>&": 1}}
    runs = tuple(replace(run, **hostile) for run in compared.runs)
    settings = {**compared.settings, "data": HOSTILE[0]}
    trials = (Trial("ce", {"lr": HOSTILE[1]}, 0.5, 1.0, chosen=True), Trial("ce", {"lr": 2.0}, None, 1.0))
    page = write_page(Comparison(tmp_path / "<b>out", settings, compared.thresholds, runs, trials)).read_text()
    assert "<script" not in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == 4
    assert "$x$ &lt;i&gt;&amp;" in page


def test_the_page_of_the_same_results_has_the_same_bytes(compared: Comparison) -> None:
    before = compared.page.read_bytes()
    assert write_page(compared).read_bytes() == before
    text = before.decode()
    for words in (
        "many (&gt;15)",
        "last epoch",
        "best epoch",
        "ECE",
        "Nothing was tuned",
        "cross-entropy",
    ):
        assert words in text


def test_numbers_are_mean_and_sample_deviation() -> None:
    assert percents([0.5, 0.6, None]) == "55.00 ± 7.07"
    assert percents([0.123456]) == "12.35"
    assert (numbers([]), percents([None])) == ("none", "none")
    known = {"method": "ce", "variant": "", "many_above": 9, "few_below": 2, "last_accuracy": 0.25}
    row = defaultdict(lambda: None, known)
    (header, line) = summary([row])
    assert header[:5] == ["method", "seeds", "last epoch", "many (>9)", "medium (2-9)"]
    assert line[:4] == ["cross-entropy", "1", "25.00", "none"]


def test_measuring_in_bfloat16_is_close_to_float32(compared: Comparison, toy_npz: Path) -> None:
    from ltloss.training.model.classifier import Classifier
    from ltloss.training.run.prepare import prepare_data
    from ltloss.training.run.settings import Settings

    data = prepare_data(Settings(**small(toy_npz, loss="cosine")))
    classifier = Classifier(data.config)
    exact, half = (measure(classifier, data.test, Thresholds(), amp=amp) for amp in (False, True))
    assert half.loss == pytest.approx(exact.loss, rel=0.02)
    assert half.loss != exact.loss


def test_the_command_prints_its_table_and_continues(
    toy_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "compare",
        "--data",
        str(toy_npz),
        "--losses",
        "ce, long-tail",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--jobs",
        "1",
    ]
    line += ["--recipe", "small", "--vary", "feature_norm=ring,hinge", "--out", str(tmp_path)]
    assert main([*line[:4], "long-tail", *line[5:]]) == 0
    shown = capsys.readouterr().out
    assert "long-tail loss (feature_norm=hinge)" in shown
    assert f"open {tmp_path / 'comparison.html'}" in shown
    assert main([*line[:4], "long-tail", *line[5:], "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(line) == 2
    assert not missing(capsys.readouterr().err, "softmax", "feature_norm")


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (["--losses", "ce,nonsense"], ["--losses", "nonsense"]),
        (["--losses", "ce", "--vary", "lr"], ["--vary", "'lr'"]),
        (["--losses", "ce", "--jobs", "0"], ["jobs", "1", "0"]),
        (["--losses", "ce", "--data", "nowhere.npz"], ["nowhere.npz"]),
        (["--losses", "ce", "--recipe", "none"], ["--recipe", "none"]),
        (["--losses", "ce", "--out", "{taken}"], ["--out", "{taken}"]),
        (["--losses", "ce", "--out", "{taken}/file"], ["--out", "{taken}/file"]),
    ],
)
def test_mistakes_end_in_one_line(
    options: list[str], facts: list[str], toy_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    line = ["compare", "--data", str(toy_npz), "--out", str(tmp_path / "out"), "--jobs", "1"]
    fails([*line, *(option.format(taken=taken) for option in options)], capsys, *(f.format(taken=taken) for f in facts))
    assert [path.name for path in taken.iterdir()] == ["file"]
    assert not (tmp_path / "out" / "runs").exists()


def test_the_methods_are_listed_without_other_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--list"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "long-tail-prior: long-tail margins with log prior" in shown
    assert "tunes  lr: the recipe's times 0.25, 0.5, 1.0, 2.0, 4.0" in shown


def test_folders_of_images_and_the_digits_can_be_compared(toy_folder: Path, tmp_path: Path) -> None:
    for data, options in ((toy_folder, {}), ("digits", {"limit_per_class": 6, "limit_test": 30})):
        given = {**SMALL, "data": str(data), "epochs": 1, "imbalance": 2.0, **options}
        found = compare(
            tmp_path / f"{Path(data).name}-compared", given, ["cosine"], seeds=1, tune=data == "digits", quiet=True
        )
        assert found.rows[0]["last_accuracy"] is not None


def test_images_that_change_are_other_results(tmp_path: Path) -> None:
    for seed in (0, 1):
        x, y = toy_images(6, seed=seed)
        np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        compare(tmp_path / "out", small(tmp_path / "data.npz", epochs=1, imbalance=1.0), ["ce"], seeds=1, quiet=True)
    assert len(files_of(tmp_path / "out")) == 2
