"""The page that a training run leaves behind: what was trained, how it went, and where it is weak."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ltloss._files import write_file
from ltloss.errors import UserError
from ltloss.functional import nearest_prototype
from ltloss.training.data.batches import batches
from ltloss.training.data.images import ImageSource
from ltloss.training.data.sources import check_same_classes
from ltloss.training.measure.evaluate import measure
from ltloss.training.model.classifier import Classifier
from ltloss.training.pages import plots
from ltloss.training.pages.html import PLOTS_STYLE, details, escape, figure, page, table, tiles
from ltloss.training.pages.plots import Plot
from ltloss.training.run.prepare import apply_limits, load_split
from ltloss.training.run.run_config import RunConfig
from ltloss.training.run.settings import SETTINGS

_SAMPLE = 2000  # test images whose feature lengths are drawn
_ROWS = 12  # classes in each of the tables of the weakest and the closest

# What decides a setting that has no value.
_LEFT_OPEN = {
    "image_size": "that of the data",
    "channels": "that of the data",
    "crop_pad": "an eighth of the side",
    "data_seed": "that of seed",
    "device": "a GPU where there is one",
    "amp": "on a GPU",
}

_Epochs = dict[str, list[float]]


@dataclass(frozen=True)
class _Run:
    """What the run's own files say."""

    path: Path
    config: RunConfig
    epochs: _Epochs

    @property
    def stops_early(self) -> bool:
        """Whether the epoch that is used is the best on the validation part, not the last."""
        return self.config.settings.early_stopping is not None

    @property
    def _row(self) -> int:
        return int(np.nanargmax(self.epochs["validation_balanced_accuracy"])) if self.stops_early else -1

    @property
    def last_epoch(self) -> int:
        """The epoch that is used."""
        return int(self.epochs["epoch"][self._row])

    @property
    def which(self) -> str:
        """That epoch in words."""
        return "best validation epoch" if self.stops_early else "last epoch"

    @property
    def title(self) -> str:
        return f"{self.which.capitalize()} ({self.last_epoch})"

    def last(self, name: str) -> float:
        """The value of the epoch that is used, NaN where it was not measured."""
        return self.epochs[name][self._row] if name in self.epochs else math.nan


@dataclass
class _Body:
    """The pieces of the page as they come: figures, tables in HTML, and reasons why something is not there."""

    figures: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def add(self, plot: Plot, about: str) -> None:
        """Add a figure with ``about``, text that says what it shows."""
        self.figures.append(figure(plot, about))


def _number(text: str | None) -> float:
    """NaN for what was not measured or is infinite: a gap in a curve."""
    value = float(text) if text else math.nan
    return value if math.isfinite(value) else math.nan


def _read_epochs(run: Path) -> _Epochs:
    path = run / "metrics.csv"
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        columns = {name: [_number(row[name]) for row in rows] for name in (rows[0] if rows else ())}
        if not all(epoch >= 1 and epoch.is_integer() for epoch in columns.get("epoch", [])):
            raise ValueError("an epoch is no whole number from 1")
    except FileNotFoundError:
        columns = {}
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}); finish another epoch, which writes it anew") from error
    if "epoch" not in columns:
        raise UserError(f"{run} has no finished epoch to report; finish one with `ltloss train --resume --out {run}`")
    return columns


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}%"


def _add_curves(body: _Body, run: _Run) -> None:
    epochs = [int(epoch) for epoch in run.epochs["epoch"]]

    def series(factor: float, **columns: str) -> dict[str, list[float]]:
        found = {label: [factor * v for v in run.epochs.get(name, [])] for label, name in columns.items()}
        return {label: values for label, values in found.items() if np.isfinite(values).any()}

    loss = series(1, training="train_loss", test="test_loss")
    if loss:
        about = "Training: the loss itself, with its margins. Test: cross-entropy without margins."
        body.add(plots.learning_curve("loss", "Loss", epochs, loss, axis="loss (nats)"), about)
    accuracy = series(100, training="train_accuracy", test="test_accuracy")
    if accuracy:
        plot = plots.learning_curve("accuracy", "Accuracy", epochs, accuracy, axis="accuracy (%)", percent=True)
        body.add(plot, "Fraction of the images classified correctly. Training: measured while the weights change.")


def _add_groups(body: _Body, run: _Run) -> None:
    words = run.config.settings.thresholds.describe()
    values = {name: run.last(name) for name in words}
    bars = [(words[name], None if math.isnan(value) else value) for name, value in values.items()]
    about = f"By number of training images, mean accuracy of the group's classes. {run.title}."
    body.add(plots.groups("groups", bars), about)


def _stored_accuracy(run: _Run) -> tuple[np.ndarray, int] | None:
    """Accuracy per class (C,) and the number of test images from evaluation.json, if that is of the last epoch."""
    try:
        stored = json.loads((run.path / "evaluation.json").read_text(encoding="utf-8"))
        fresh = stored["accuracy"] == run.last("test_accuracy") and tuple(stored["per_class"]) == run.config.class_names
        return (_as_array(stored["per_class"].values()), int(stored["pictures"])) if fresh else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None  # it can be measured again


def _as_array(accuracies: Iterable[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in accuracies], dtype=np.float64)


def _add_classes(body: _Body, run: _Run, accuracy: np.ndarray, images: int) -> None:
    counts, known = np.array(run.config.class_counts), np.isfinite(accuracy)
    if not known.any():
        body.missing.append("Accuracy by class: there are no test images.")
        return
    about = f"One point per class, {images:,} test images. {run.title}."
    body.add(plots.accuracy_by_count("classes", counts, accuracy), about)
    weakest = np.argsort(accuracy, kind="stable")[: min(_ROWS, known.sum())]  # NaN is sorted last
    rows = [(run.config.class_names[c], f"{counts[c]:,}", _percent(accuracy[c])) for c in weakest]
    content = table(["class", "training images", "test accuracy"], rows, numeric=(1, 2))
    body.tables.append(details("The classes of lowest accuracy", content, opened=True))


def _test_images(run: _Run) -> ImageSource:
    settings = run.config.settings
    source = load_split(settings, "test", run.config.image_shape)
    check_same_classes(run.config.class_names, source.class_names, f"run {run.path}", settings.data)
    return apply_limits(source, settings, "test")


@torch.inference_mode()
def _add_lengths(body: _Body, classifier: Classifier, source: ImageSource) -> None:
    sample = np.unique(np.linspace(0, len(source) - 1, min(_SAMPLE, len(source))).astype(np.int64))
    lengths = [classifier.features(batch.images).float().norm(dim=1).cpu() for batch in batches(source, 256, sample)]
    finite = _only_finite(body, torch.cat(lengths).numpy(), "Feature lengths", "test images")
    if len(finite):
        plot = plots.histogram("lengths", "Feature lengths", finite, axis="length ‖x‖ (no unit)", what="test images")
        body.add(plot, f"Of {len(finite):,} test images, before normalisation.")


def _only_finite(body: _Body, values: np.ndarray, title: str, what: str) -> np.ndarray:
    """The values that can be drawn; the page says how many cannot."""
    finite: np.ndarray = values[np.isfinite(values)]
    if len(finite) < len(values):
        body.missing.append(
            f"{title}: {len(values) - len(finite):,} of {len(values):,} {what} have a value that is not finite, so the "
            "training diverged; train again with a lower learning rate."
        )
    return finite


def _add_prototypes(body: _Body, run: _Run, classifier: Classifier) -> None:
    """How far apart the class prototypes lie, and which lie closest."""
    names = run.config.class_names
    prototypes = classifier.loss.weight.detach()
    if len(names) < 2:
        body.missing.append("Angles between prototypes: there is only one class.")
        return
    nearest = nearest_prototype(prototypes)
    degrees = nearest.cosine.double().clamp(-1, 1).acos().rad2deg().cpu().numpy()
    finite = _only_finite(body, degrees, "Angles between prototypes", "classes")
    if not len(finite):
        return
    widest = math.degrees(math.acos(-1 / (len(names) - 1)))
    evenly = (widest, f"evenly spread: {widest:.1f}°") if len(names) <= prototypes.shape[-1] + 1 else None
    axis = "angle to the nearest prototype (°)"
    plot = plots.histogram("angles", "Angles between prototypes", finite, axis=axis, what="classes", mark=evenly)
    body.add(plot, "Each class's prototype and the one nearest to it: the larger, the better the classes are apart.")
    partner = nearest.index.cpu().numpy()
    pairs = {
        (min(c, partner[c]), max(c, partner[c])): degrees[c] for c in np.argsort(degrees, kind="stable")[: len(finite)]
    }
    rows = [(names[a], names[b], f"{angle:.1f}°") for (a, b), angle in list(pairs.items())[:_ROWS]]
    content = table(["class", "and", "angle"], rows, numeric=(2,))
    body.tables.append(details("The closest prototypes", content, opened=True))


def _add_from_checkpoint(body: _Body, run: _Run, device: str | None) -> None:
    """All that needs the checkpoint or the test images; what cannot be had is said on the page instead."""
    stored = _stored_accuracy(run)
    if stored is not None:
        _add_classes(body, run, *stored)
    absent = "Feature lengths" if stored is not None else "Accuracy by class and feature lengths"
    try:
        classifier = Classifier.load(run.path, device)
    except UserError as error:
        body.missing.append(f"{absent}, angles between prototypes: {error}.")
        return
    try:
        source = _test_images(run)
        if stored is None:
            metrics = measure(classifier, source, run.config.settings.thresholds)
            _add_classes(body, run, _as_array(metrics.per_class), metrics.images)
        _add_lengths(body, classifier, source)
    except UserError as error:
        body.missing.append(f"{absent}, which need the test images: {error}.")
    _add_prototypes(body, run, classifier)


def _configuration(run: _Run) -> Iterator[str]:
    config = run.config
    facts = [
        ("classes", f"{len(config.class_names):,}"),
        ("training images", f"{sum(config.class_counts):,}"),
        ("smallest and largest class", f"{min(config.class_counts):,} and {max(config.class_counts):,} images"),
        ("image shape", " × ".join(str(side) for side in config.image_shape) + " (channels × height × width)"),
        ("mean", ", ".join(f"{value:.4g}" for value in config.mean)),
        ("standard deviation", ", ".join(f"{value:.4g}" for value in config.std)),
    ]
    yield '<h2>Configuration</h2>\n<div class="plots">\n<div>'
    yield table(["data", "value"], facts) + "<br>" + table(["software", "version"], config.versions.items())
    yield "</div>\n<div>"
    yield table(["setting", "value"], _settings_in_force(config)) + "</div>\n</div>"


def _settings_in_force(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Every setting with its value, the options of the loss as settings of their own."""
    settings = config.in_force().settings  # which an early run did not record
    for name in SETTINGS:
        value = getattr(settings, name)
        if name == "loss_options":
            yield from sorted(value.items())
        else:
            yield name, _LEFT_OPEN.get(name, "none") if value is None else value


def _header(run: _Run, title: str) -> Iterator[str]:
    config, epoch = run.config, run.last_epoch
    yield f"<h1>{escape(title)}</h1>"
    what = f"{config.loss} loss, {config.backbone} backbone, {config.settings.data}"
    yield f'<p class="quiet">{escape(what)}</p>'
    if run.stops_early:
        yield f"<p>Of {len(run.epochs['epoch'])} epochs the best on the validation part is used: epoch {epoch}.</p>"
    elif epoch < config.settings.epochs:
        yield f"<p>The run stands at epoch {epoch} of {config.settings.epochs}.</p>"
    yield tiles(
        [
            (f"test accuracy, {run.which} ({epoch})", _percent(run.last("test_accuracy"))),
            *((f"{name}, {run.which}", _percent(run.last(name))) for name in ("many", "medium", "few")),
            (f"training accuracy, {run.which}", _percent(run.last("train_accuracy"))),
            ("time", _duration(sum(value for value in run.epochs.get("seconds", []) if not math.isnan(value)))),
        ]
    )
    yield f'<p class="quiet">Every number is that of the {run.which}; no epoch was chosen by its test result.</p>'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _page_body(run: _Run, body: _Body, title: str) -> Iterator[str]:
    yield from _header(run, title)
    yield f'<h2>Results</h2>\n<div class="plots">\n{"".join(body.figures)}\n</div>'
    if body.missing:
        yield '<h2>Not shown</h2>\n<ul id="missing">'
        yield from (f"<li>{escape(reason)}</li>" for reason in body.missing)
        yield "</ul>"
    if body.tables:
        yield '<h2>Where it is weak</h2>\n<div class="plots">'
        yield from (f"<div>{content}</div>" for content in body.tables)
        yield "</div>"
    yield from _configuration(run)


def write_report(run_dir: str | Path, *, device: str | None = None) -> Path:
    """Write ``run_dir/report.html`` from the run's metrics, newest checkpoint and test images; return its path.

    Where the checkpoint or the images are not there any more, the page says what is missing. The same run gives the
    same bytes.

    Raises:
        UserError: ``run_dir`` is no run, or no epoch of it has finished.
    """
    path = Path(run_dir)
    run = _Run(path, RunConfig.read(path), _read_epochs(path))
    body = _Body()
    _add_curves(body, run)
    _add_groups(body, run)
    _add_from_checkpoint(body, run, device)
    title = f"Training run {path.resolve().name}"
    target = path / "report.html"
    write_file(target, "".join(page(title, _page_body(run, body, title), style=PLOTS_STYLE)).encode())
    return target
