from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.browser import needs_chromium, render
from helpers.pages import Page
from helpers.refusals import missing, refused
from helpers.small_run import HOSTILE, history, make_run
from helpers.toys import toy_settings

from ltloss.errors import UserError
from ltloss.training.data.embeddings import ArrayEmbeddings
from ltloss.training.data.images import ArrayImages
from ltloss.training.measure.details import Mistake
from ltloss.training.model.classifier import Classifier
from ltloss.training.pages import plots
from ltloss.training.pages.html import escape
from ltloss.training.pages.run_files import Run
from ltloss.training.pages.run_report import write_report
from ltloss.training.pages.sections import Body, add_mistakes
from ltloss.training.run.checkpoint import Checkpoint, save_checkpoint
from ltloss.training.run.run_config import RunConfig
from ltloss.training.run.trainer import Trainer, TrainingResult, train

pytestmark = pytest.mark.slow

FIGURES = {
    "Loss",
    "Accuracy",
    "Many, medium and few",
    "Accuracy and class size",
    "Confusions",
    "Calibration",
    "Feature lengths",
    "Angles between prototypes",
    "What the loss sees",
}
FROM_IMAGES = {"Accuracy and class size", "Confusions", "Calibration", "Feature lengths", "What the loss sees"}
DIGITS = tuple("0123456789")


def figures(page: Page) -> dict[str, str]:
    """The first words of each figure's description by title."""
    text = page.path.read_text(encoding="utf-8")
    titles = re.findall(r"<figcaption>([^<]+)<span", text)
    return dict(zip(titles, (a["aria-label"] for a in page.all("div") if a.get("role") == "img"), strict=True))


def cells(page: Page) -> dict[str, str]:
    """Tables of two columns as a mapping."""
    rows = re.findall(r"<tr><td[^>]*>(.*?)</td><td[^>]*>(.*?)</td></tr>", page.path.read_text(encoding="utf-8"))
    return dict(rows)


@pytest.fixture(scope="module")
def trained(toy_run: TrainingResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was really trained, with its report."""
    folder = tmp_path_factory.mktemp("report") / "toy"
    shutil.copytree(toy_run.run, folder)
    write_report(folder)
    return folder


def test_report_of_a_trained_run_has_every_figure(trained: Path) -> None:
    page = Page(trained / "report.html")
    page.check()
    assert set(figures(page)) == FIGURES
    assert len(page.all("svg")) == len(FIGURES)
    assert "Not shown" not in page.text
    assert cells(page)["epochs"] == "2"
    assert cells(page)["training images"] == "60"


def test_the_configuration_shows_the_values_in_force(trained: Path, tmp_path: Path) -> None:
    shown = cells(Page(trained / "report.html"))
    assert "default" not in shown.values()
    assert (shown["scale"], shown["margin"], shown["tau"], shown["amp"]) == ("8.0", "0.5", "0.0", "False")
    assert (shown["min_angle_weight"], shown["feature_norm_weight"], shown["feature_norm"]) == ("0.1", "0.1", "ring")
    make_run(tmp_path / "run", DIGITS, shape=(1, 8, 8), loss="arcface")  # which recorded nothing
    assert cells(Page(write_report(tmp_path / "run")))["margin"] == "0.5"


def test_report_is_the_same_each_time(trained: Path) -> None:
    first = (trained / "report.html").read_bytes()
    assert write_report(trained).read_bytes() == first


def test_numbers_are_those_of_the_last_epoch(tmp_path: Path) -> None:
    rows = history(3)
    rows[1]["test_accuracy"] = 0.99
    rows[2].update(test_accuracy=0.4321, train_accuracy=0.8765)
    make_run(tmp_path / "run", DIGITS, shape=(1, 8, 8), rows=rows)
    page = Page(write_report(tmp_path / "run"))
    tiles = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page.path.read_text(encoding="utf-8")))
    assert tiles["test accuracy, last epoch (3)"] == "43.2%"
    assert tiles["training accuracy, last epoch"] == "87.6%"
    assert tiles["medium, last epoch"] == "–"
    assert "99.0%" not in page.text
    assert "medium (20-100): none" in figures(page)["Many, medium and few"]
    assert ">none</text>" in page.path.read_text(encoding="utf-8")


def test_accuracy_by_class_is_measured_on_the_test_images(tmp_path: Path) -> None:
    from ltloss.training.measure.evaluate import evaluate_run

    make_run(tmp_path / "run", DIGITS, shape=(1, 8, 8))
    page = Page(write_report(tmp_path / "run"))
    per_class = evaluate_run(tmp_path / "run").metrics.per_class
    mean = 100 * np.mean(per_class)
    assert "10 in all, 10 to 100 training images" in figures(page)["Accuracy and class size"]
    assert f"{mean:.1f}% on average" in figures(page)["Accuracy and class size"]


def test_a_stored_evaluation_serves_only_if_it_is_of_the_last_epoch(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, ("a", "b"), data="gone.npz", rows=history(3, test_accuracy=0.25))
    stored = {"accuracy": 0.25, "pictures": 4, "per_class": {"a": 0.5, "b": None}}
    (run / "evaluation.json").write_text(json.dumps(stored))
    page = Page(write_report(run))
    assert "1 in all, 10 to 10 training images" in figures(page)["Accuracy and class size"]
    assert "Confusions, calibration, feature lengths and the map, which need the test images" in page.text
    (run / "evaluation.json").write_text(json.dumps({**stored, "accuracy": 0.75}))
    assert "Accuracy and class size" not in figures(Page(write_report(run)))


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, ("a", "b", "c"), data="nowhere/images")
    page = Page(write_report(run))
    page.check()
    assert set(figures(page)) == FIGURES - FROM_IMAGES
    absent = "Accuracy by class, confusions, calibration, feature lengths and the map, which need the test images"
    assert absent in page.text
    assert not missing(page.text, "'nowhere/images'")
    shutil.rmtree(run / "checkpoints")
    page = Page(write_report(run))
    assert set(figures(page)) == {"Loss", "Accuracy", "Many, medium and few"}
    with pytest.raises(UserError) as reason:
        Classifier.load(run)
    assert str(reason.value) in page.text


def test_angles_are_those_between_the_prototypes(tmp_path: Path) -> None:
    classifier = make_run(tmp_path / "run", ("a", "b", "c"), data="gone.npz", embedding_size=4)
    w = torch.nn.functional.normalize(classifier.loss.weight.detach().double(), dim=1)
    cosine = (w @ w.T).fill_diagonal_(-1).amax(1)
    degrees = sorted(math.degrees(math.acos(c)) for c in cosine.tolist())
    page = Page(write_report(tmp_path / "run"))
    words = figures(page)["Angles between prototypes"]
    assert f"{degrees[0]:.3g} to {degrees[-1]:.3g}" in words
    assert "evenly spread: 120.0°" in words
    assert f"{degrees[0]:.1f}°" in page.text


@pytest.mark.parametrize("names", [("only",), HOSTILE, tuple(f"class {n}" for n in range(3500))])
def test_any_classes(names: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, names, data="<b>&.npz", embedding_size=4, rows=history(1, test_accuracy=0.25))
    accuracy = np.random.default_rng(0).random(len(names)).tolist()
    stored = {"accuracy": 0.25, "pictures": 9, "per_class": dict(zip(names, accuracy, strict=True))}
    (run / "evaluation.json").write_text(json.dumps(stored))
    page = Page(write_report(run))
    page.check()
    assert page.path.stat().st_size < 1_000_000
    weakest = names[int(np.argmin(accuracy))]
    assert weakest in page.text
    assert f"{len(names)} in all" in figures(page)["Accuracy and class size"]
    if len(names) == 1:
        assert "there is only one class" in page.text


def test_a_run_that_stopped_early_says_so(tmp_path: Path) -> None:
    make_run(tmp_path / "run", ("a", "b"), data="gone.npz", epochs=40)
    assert "The run stands at epoch 3 of 40." in Page(write_report(tmp_path / "run")).text


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda run: shutil.rmtree(run), ""),
        (lambda run: (run / "metrics.csv").unlink(), ""),
        (lambda run: (run / "metrics.csv").write_text("epoch,lr\n"), ""),
        (lambda run: (run / "metrics.csv").write_text("epoch,lr\n1,much\n"), "metrics.csv"),
        (lambda run: (run / "metrics.csv").write_bytes(b"\xff\xfe\x00"), "metrics.csv"),
        (lambda run: (run / "config.json").write_text("{"), "config.json"),
    ],
)
def test_mistakes_are_one_line(damage: object, named: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, ("a", "b"), data="gone.npz")
    assert callable(damage)
    damage(run)
    with refused(str(run / named), error=UserError):
        write_report(run)
    assert not (run / "report.html").exists()


def test_equal_values_make_a_histogram() -> None:
    for value in (0.0, 5.0, -1e-20):
        plot = plots.histogram("h", "H", np.full(7, value), axis="x (m)", what="things")
        assert "7 things by x (m)" in plot.alt
        assert "nan" not in plot.svg.lower()


def test_gaps_in_a_curve_are_left_out() -> None:
    series = {"training": [3.0, 2.0, 1.0], "test": [math.nan, 2.5, math.nan]}
    plot = plots.learning_curve("c", "C", [1, 2, 3], series, axis="loss")
    assert "nan" not in plot.svg
    assert "epochs 1 to 3" in plot.alt


def test_a_long_label_is_broken_into_lines_and_leaves_room_for_its_row(recwarn: pytest.WarningsRecorder) -> None:
    label = "long-tail margins with log prior (normalize_features=False, scale=1.5, feature_norm_weight=0.1)"
    plot = plots.means_with_spread("l", "L", [(label, 0.5, 0.1), ("$a$", 0.4, 0.1)], axis="x")
    assert not recwarn.list, [str(warning.message) for warning in recwarn]  # matplotlib's, about no room
    lines = re.findall(r">([^<>]+)</(?:text|tspan)>", plot.svg)
    assert "long-tail margins with log prior" in lines
    assert "$a$" in lines
    assert label in plot.alt


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("flags", [(), ("--window-size=390,800", "--blink-settings=preferredColorScheme=0")])
def test_browser_shows_the_report(trained: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    rendered = render(trained / "report.html", tmp_path, *flags)
    assert rendered.console == []
    assert rendered.found["requests"] == []
    assert rendered.found["scripts"] == 0
    assert len(rendered.found["figures"]) == len(FIGURES)
    assert all(width > 250 for width in rendered.found["figures"])
    assert rendered.found["overflow"] <= 0
    assert rendered.found["cut"] == 0
    assert "test accuracy, last epoch (2)" in rendered.found["text"]


@pytest.mark.parametrize("epoch", ["nan", "", "inf", "1.5", "0", "x"])
def test_a_history_with_a_bad_epoch_is_named(trained: Path, tmp_path: Path, epoch: str) -> None:
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "metrics.csv"
    head, first, *_ = path.read_text().splitlines()
    path.write_text(f"{head}\n{epoch},{first.partition(',')[2]}\n")
    with refused(str(path), error=UserError):
        write_report(tmp_path / "run")


def test_infinite_metrics_are_gaps(tmp_path: Path) -> None:
    infinite = dict.fromkeys(("train_loss", "test_loss", "test_accuracy", "many", "seconds"), math.inf)
    make_run(tmp_path / "run", DIGITS, rows=history(3, **infinite))
    Page(write_report(tmp_path / "run")).check()


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(None)], ids=["one class", "all"])
def test_a_diverged_model_is_said_on_the_page(tmp_path: Path, value: float, rows: slice) -> None:
    classifier = make_run(tmp_path / "run", DIGITS, shape=(1, 8, 8))
    classifier.loss.weight.data[rows] = value
    classifier.norm.weight.data.fill_(value)  # type: ignore[union-attr, operator]
    save_checkpoint(tmp_path / "run", 4, Checkpoint(classifier.state_dict(), {}, {"history": history(3)}))
    page = Page(write_report(tmp_path / "run"))
    page.check()
    assert not {"Feature lengths", "What the loss sees"} & set(figures(page))
    assert "Confusions" in figures(page)
    assert "not finite, so the training diverged" in page.text
    assert not (tmp_path / "run" / "map.json").exists()


def test_prototypes_that_are_not_finite_are_left_out_of_the_map(tmp_path: Path) -> None:
    classifier = make_run(tmp_path / "run", DIGITS, shape=(1, 8, 8))
    classifier.loss.weight.data[3] = math.nan
    save_checkpoint(tmp_path / "run", 4, Checkpoint(classifier.state_dict(), {}, {"history": history(3)}))
    write_report(tmp_path / "run").read_text()
    placed = json.loads((tmp_path / "run" / "map.json").read_text())
    assert [name for *_, name in placed["prototypes"]] == list("012456789")


@pytest.mark.parametrize(
    "options",
    [{"loss": "softmax"}, {"loss": "arcface", "loss_options": {"sub_centers": 3}}],
    ids=["softmax", "centers"],
)
def test_every_kind_of_head_has_the_whole_report(options: dict[str, object], tmp_path: Path) -> None:
    make_run(tmp_path / "run", DIGITS, shape=(1, 8, 8), **options)
    page = Page(write_report(tmp_path / "run"))
    page.check()
    assert set(figures(page)) == FIGURES
    placed = json.loads((tmp_path / "run" / "map.json").read_text())
    assert len(placed["prototypes"]) == 10 * (3 if "loss_options" in options else 1)


def test_what_was_measured_is_on_the_page(tmp_path: Path) -> None:
    from ltloss.training.measure.evaluate import evaluate_run

    last = {"top5_accuracy": 0.7654, "balanced_accuracy": 0.3456, "macro_f1": 0.2344}
    make_run(tmp_path / "run", DIGITS, shape=(1, 8, 8), rows=history(3, **last))
    page = Page(write_report(tmp_path / "run"))
    details = evaluate_run(tmp_path / "run").details
    assert details is not None
    assert [fact for fact in ("76.5%", "34.6%", "23.4%", "The largest confusions") if fact not in page.text] == []
    first = details.confusions[0]
    assert f"{first.images} images of {first.label} taken for {first.predicted}" in figures(page)["Confusions"]
    shown = [image["alt"] for image in page.all("img")]
    assert shown == [f"{one.image}: {one.predicted}" for one in details.mistakes]
    assert page.text.count("✗ labelled") == len(shown) == 24


def test_what_was_stored_is_not_measured_again(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*given: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("ltloss.training.pages.run_report.measure_in_detail", measured)
    run = tmp_path / "toy"
    shutil.copytree(trained, run)
    assert write_report(run).read_bytes() == (trained / "report.html").read_bytes()
    stored = json.loads((run / "evaluation.json").read_text())
    stored["confusions"] = "?"
    (run / "evaluation.json").write_text(json.dumps(stored))
    with pytest.raises(AssertionError, match="measured"):
        write_report(run)


def test_an_epoch_that_was_not_measured_is_shown_as_it_was_at_the_end(tmp_path: Path) -> None:
    """With early stopping the epoch that is used need not be one of every fifth."""
    run = tmp_path / "run"
    given = {"early_stopping": 1, "validation_fraction": 0.2, "data": "gone.npz"}
    unmeasured = {"test_accuracy": None, "few": None}
    rows = [{**row, **unmeasured, "validation_balanced_accuracy": 0.5 - row["epoch"] / 10} for row in history(3)]
    make_run(run, ("a", "b"), rows=rows, **given)
    stored = {"accuracy": 0.8125, "few": 0.6875, "macro_f1": None, "pictures": 4, "per_class": {"a": 0.5, "b": None}}
    (run / "evaluation.json").write_text(json.dumps(stored))
    text = write_report(run).read_text()
    tiles = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert tiles["test accuracy, best validation epoch (1)"] == "81.2%"
    assert tiles["few, best validation epoch"] == "68.8%"
    assert "macro-F1, best validation epoch" not in tiles
    assert "1 in all, 10 to 10 training images" in figures(Page(run / "report.html"))["Accuracy and class size"]


def test_a_resume_that_was_killed_shows_nothing_of_an_earlier_epoch(toy_npz: Path, tmp_path: Path) -> None:
    original, run = Trainer.run_epoch, tmp_path / "run"

    def killed(self: Trainer, epoch: int, *given: Any) -> dict[str, Any]:
        if epoch == 4:
            raise KeyboardInterrupt
        return original(self, epoch, *given)

    train(run, toy_settings(toy_npz, evaluate_every=2), quiet=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "run_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            train(run, {"epochs": 4}, resume=True, quiet=True)
    tiles = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", write_report(run, device="cpu").read_text()))
    assert tiles["test accuracy, last epoch (3)"] == "–"
    train(run, {"epochs": 4}, resume=True, quiet=True)
    assert "test accuracy, last epoch (4)" in write_report(run, device="cpu").read_text()


def test_errors_without_previews_are_a_table(tmp_path: Path) -> None:
    """Of embeddings, which have no images, and of test images that are not those of the run any more."""
    make_run(tmp_path / "run", HOSTILE, data="gone.npz")
    run = Run(tmp_path / "run", RunConfig.read(tmp_path / "run"), {})
    found = [Mistake(1, "<b>1", 0, 2, 0.96), Mistake(0, "row 0", 1, 5, 0.5)]
    other = ArrayImages(np.zeros((2, 8, 8), np.uint8), np.zeros(2, np.int64), HOSTILE, ["row 0", "row 1"])
    rows = np.arange(2)
    embeddings = ArrayEmbeddings(np.zeros((2, 3)), rows, rows, HOSTILE, np.array(["row 0", "<b>1"]))
    for source in (None, other, embeddings):
        body = Body()
        add_mistakes(body, run, found, source)
        assert "<img" not in "".join(body.wide)
        assert not missing("".join(body.wide), "&lt;b&gt;1", escape(HOSTILE[2]), "96.0%", escape(HOSTILE[0]))


def test_one_epoch_and_classes_of_like_sizes_have_ticks_of_their_own() -> None:
    one = plots.learning_curve("c", "C", [1], {"training": [2.5]}, axis="loss")
    assert re.findall(r">([\d.]+)</text>", one.svg)[0] == "1", "the first tick is that of the epochs"
    for counts, ticks in (([8, 8], {"7", "8", "9", "10"}), ([128, 131], {"100", "120", "140", "160"})):
        alike = plots.accuracy_by_count("a", np.array(counts), np.array([0.0, 1.0]))
        assert set(re.findall(r">([\d.]+)</text>", alike.svg)) >= ticks
