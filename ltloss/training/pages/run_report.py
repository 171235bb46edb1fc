"""The page of a training run: what was trained, how the training went, and where the classifier is weak."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ltloss._files import write_file
from ltloss.errors import UserError
from ltloss.training.data.embeddings import Source
from ltloss.training.data.sources import check_same_classes
from ltloss.training.measure.evaluate import measure_in_detail
from ltloss.training.model.classifier import Classifier
from ltloss.training.pages.cards import CARDS_STYLE
from ltloss.training.pages.geometry import add_lengths, add_map, add_prototypes, sample_features
from ltloss.training.pages.html import PLOTS_STYLE, escape, page, table, tiles
from ltloss.training.pages.run_files import Measured, Run, read_measured, read_run
from ltloss.training.pages.sections import (
    Body,
    add_calibration,
    add_classes,
    add_confusions,
    add_curves,
    add_groups,
    add_mistakes,
    percent,
)
from ltloss.training.run.prepare import apply_limits, load_split, without_use
from ltloss.training.run.run_config import RunConfig
from ltloss.training.run.settings import SETTINGS

# How settings without a value are decided.
_LEFT_OPEN = {
    "image_root": "the folder of a list",
    "image_size": "that of the data",
    "channels": "that of the data",
    "crop_pad": "an eighth of the side",
    "data_seed": "that of seed",
    "device": "a GPU where there is one",
    "amp": "on a GPU",
}


def _test_images(run: Run) -> Source:
    settings = run.config.settings
    source = load_split(settings, "test", run.config.image_shape)
    check_same_classes(run.config.class_names, source.class_names, f"run {run.path}", settings.data)
    return apply_limits(source, settings, "test")


def _add_from_checkpoint(body: Body, run: Run, device: str | None, map_method: str) -> None:
    """Add everything that needs the checkpoint or the test images; the page names what is missing."""
    found, source = read_measured(run), None
    absent = "feature lengths and the map"
    if found is None or found.details is None:
        absent = f"confusions, calibration, {absent}"
    if found is None:
        absent = f"accuracy by class, {absent}"
    absent = absent[0].upper() + absent[1:]
    try:
        classifier = Classifier.load(run.path, device)
    except UserError as error:
        body.missing.append(f"{absent}, angles between prototypes: {error}.")
        _add_measured(body, run, found, None)
        return
    sampled = None
    try:
        source = _test_images(run)
        if found is None or found.details is None:
            found = Measured.of(*measure_in_detail(classifier, source, run.config.settings.thresholds))
        sampled = sample_features(classifier, source, found.details)
    except UserError as error:
        body.missing.append(f"{absent}, which need the test images: {error}.")
    _add_measured(body, run, found, source)
    if sampled is not None:
        add_lengths(body, sampled)
    add_prototypes(body, run, classifier)
    if sampled is not None:
        add_map(body, run, classifier, sampled, map_method)


def _add_measured(body: Body, run: Run, found: Measured | None, source: Source | None) -> None:
    if found is None:
        return
    add_classes(body, run, found)
    if found.details is not None:
        add_confusions(body, run, found.details)
        add_calibration(body, run, found.details)
        add_mistakes(body, run, found.details.mistakes, source)


def _configuration(run: Run) -> Iterator[str]:
    config = run.config
    facts = [
        ("classes", f"{len(config.class_names):,}"),
        ("training images", f"{sum(config.class_counts):,}"),
        ("smallest and largest class", f"{min(config.class_counts):,} and {max(config.class_counts):,} images"),
    ]
    if config.of_embeddings:
        facts.append(("features of an embedding", f"{config.image_shape[0]:,}"))
    else:
        facts += [
            ("image shape", " × ".join(str(side) for side in config.image_shape) + " (channels × height × width)"),
            ("mean", ", ".join(f"{value:.4g}" for value in config.mean)),
            ("standard deviation", ", ".join(f"{value:.4g}" for value in config.std)),
        ]
    yield '<h2>Configuration</h2>\n<div class="plots">\n<div>'
    yield table(["data", "value"], facts) + "<br>" + table(["software", "version"], config.versions.items())
    yield "</div>\n<div>"
    yield table(["setting", "value"], _settings_in_force(config)) + "</div>\n</div>"


def _settings_in_force(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Every setting with its value; options of the loss are listed one by one."""
    settings = config.in_force().settings  # an early version did not record all of them
    for name in (name for name in SETTINGS if name not in without_use(config.image_shape)):
        value = getattr(settings, name)
        if name == "loss_options":
            yield from sorted(value.items())
        else:
            yield name, _LEFT_OPEN.get(name, "none") if value is None else value


def _header(run: Run, title: str) -> Iterator[str]:
    config, epoch = run.config, run.last_epoch
    yield f"<h1>{escape(title)}</h1>"
    network = f"{config.backbone} {'head' if config.of_embeddings else 'backbone'}"
    what = f"{config.loss} loss, {network}, {config.settings.data}"
    yield f'<p class="quiet">{escape(what)}</p>'
    if run.stops_early:
        yield f"<p>Of {len(run.epochs['epoch'])} epochs the best on the validation part is used: epoch {epoch}.</p>"
    elif epoch < config.settings.epochs:
        yield f"<p>The run stands at epoch {epoch} of {config.settings.epochs}.</p>"
    yield tiles(
        [
            (f"test accuracy, {run.which} ({epoch})", percent(run.last("test_accuracy"))),
            *_more_tiles(run),
            *((f"{name}, {run.which}", percent(run.last(name))) for name in ("many", "medium", "few")),
            (f"training accuracy, {run.which}", percent(run.last("train_accuracy"))),
            ("time", _duration(sum(value for value in run.epochs.get("seconds", []) if not math.isnan(value)))),
        ]
    )
    yield f'<p class="quiet">Every number is that of the {run.which}; no epoch was chosen by its test result.</p>'


def _more_tiles(run: Run) -> Iterator[tuple[str, str]]:
    """More metrics, without those that an early version did not record, and without top-5 for at most five classes."""
    words = {"top5_accuracy": "top-5 accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro-F1"}
    for name, title in words.items():
        value = run.last(name)
        if not math.isnan(value) and (name != "top5_accuracy" or len(run.config.class_names) > 5):
            yield f"{title}, {run.which}", percent(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _page_body(run: Run, body: Body, title: str) -> Iterator[str]:
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
    yield from body.wide
    yield from _configuration(run)


def write_report(run_dir: str | Path, *, device: str | None = None, map_method: str = "auto") -> Path:
    """Write ``run_dir/report.html`` from the run's metrics, checkpoint and test images; return its path.

    The map of features on the page is also written as ``run_dir/map.json``. If the checkpoint or the images are gone,
    the page says what is missing. The same run gives the same bytes.

    Args:
        run_dir: the folder of a training run.
        device: where to compute features, such as "cuda:0"; None for a GPU where there is one.
        map_method: how the map is made: "umap", "pca", or "auto", as for
            :func:`~ltloss.training.measure.feature_map.feature_map`.

    Raises:
        UserError: ``run_dir`` is no run, no epoch of it has finished, or UMAP is wanted and not installed.
    """
    path = Path(run_dir)
    run, body = read_run(path), Body()
    add_curves(body, run)
    add_groups(body, run)
    _add_from_checkpoint(body, run, device, map_method)
    title = f"Training run {path.resolve().name}"
    target = path / "report.html"
    content = page(title, _page_body(run, body, title), style=PLOTS_STYLE + CARDS_STYLE)
    write_file(target, "".join(content).encode())
    if body.feature_map is None:
        (path / "map.json").unlink(missing_ok=True)
    else:
        write_file(path / "map.json", body.feature_map.to_json(run.config.class_names).encode())
    return target
