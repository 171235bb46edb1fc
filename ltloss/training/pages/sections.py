"""The parts of the report that need no checkpoint: the curves of the training, and the results at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ltloss.training.data.embeddings import ArrayEmbeddings
from ltloss.training.pages import classifier_plots, plots
from ltloss.training.pages.cards import bar, class_label, preview
from ltloss.training.pages.html import details, escape, figure, table
from ltloss.training.pages.plots import Plot
from ltloss.training.pages.run_files import Measured, Run

if TYPE_CHECKING:
    from ltloss.training.data.embeddings import Source
    from ltloss.training.data.images import ImageSource
    from ltloss.training.measure.details import Details, Mistake
    from ltloss.training.measure.feature_map import FeatureMap

ROWS = 12  # in each table: weakest classes, largest confusions, closest prototypes


@dataclass
class Body:
    """The pieces of the page: figures and tables in HTML, and reasons why something is missing."""

    figures: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    wide: list[str] = field(default_factory=list)  # sections below figures and tables, as wide as the page
    missing: list[str] = field(default_factory=list)
    feature_map: FeatureMap | None = None

    def add(self, plot: Plot, about: str) -> None:
        """Add a figure; the text ``about`` says what it shows."""
        self.figures.append(figure(plot, about))


def percent(value: float) -> str:
    """A fraction in percent, NaN as a dash."""
    return "–" if math.isnan(value) else f"{100 * value:.1f}%"


def add_curves(body: Body, run: Run) -> None:
    """Add loss and accuracy over the epochs."""
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


def add_groups(body: Body, run: Run) -> None:
    """Add the accuracy of the many, medium and few classes."""
    words = run.config.settings.thresholds.describe()
    values = {name: run.last(name) for name in words}
    bars = [(words[name], None if math.isnan(value) else value) for name, value in values.items()]
    about = f"By number of training images, mean accuracy of the group's classes. {run.title}."
    body.add(plots.groups("groups", bars), about)


def add_classes(body: Body, run: Run, found: Measured) -> None:
    """Add the accuracy by class: a figure of all classes, and a table of the lowest."""
    counts, accuracy = np.array(run.config.class_counts), found.accuracy
    known = np.isfinite(accuracy)
    if not known.any():
        body.missing.append("Accuracy by class: there are no test images.")
        return
    about = f"One point per class, {found.images:,} test images. {run.title}."
    body.add(plots.accuracy_by_count("classes", counts, accuracy), about)
    header = ["class", "training images", "test accuracy"]
    scores: list[np.ndarray] = [accuracy]
    if found.details is not None:
        header += ["precision", "F1"]
        scores += [np.array(column, dtype=np.float64) for column in (found.details.precision, found.details.f1)]
    weakest = np.argsort(accuracy, kind="stable")[: min(ROWS, known.sum())]  # NaN is sorted last
    rows = [
        (run.config.class_names[c], f"{counts[c]:,}", *(percent(float(score[c])) for score in scores)) for c in weakest
    ]
    content = table(header, rows, numeric=range(1, len(header)))
    body.tables.append(details("The classes of lowest accuracy", content, opened=True))


def add_confusions(body: Body, run: Run, found: Details) -> None:
    """Add the confusions between classes, as a figure and a table."""
    names, matrix = run.config.class_names, found.matrix
    if not sum(map(sum, matrix.counts)):
        return
    about = "Rows: the true class. The darker a cell, the larger its share of the row."
    if matrix.others:
        about += (
            f" The {len(matrix.classes)} classes with the largest confusions; the last row and column hold all others "
            "together, and where they meet right and wrong predictions alike."
        )
    body.add(classifier_plots.confusion("confusions", matrix, names), about)
    rows = [
        (names[pair.label], names[pair.predicted], f"{pair.images:,}", percent(pair.fraction))
        for pair in found.confusions[:ROWS]
    ]
    if rows:
        content = table(["class", "taken for", "test images", "of the class"], rows, numeric=(2, 3))
        body.tables.append(details("The largest confusions", content, opened=True))


def add_calibration(body: Body, run: Run, found: Details) -> None:
    """Add the calibration curve."""
    if not any(one.accuracy is not None for one in found.calibration):
        return
    error = run.last("calibration_error")
    known = "" if math.isnan(error) else f" Calibration error: {percent(error)}."
    about = f"Below the dashed line the classifier is surer than it is right, above it less sure.{known}"
    body.add(classifier_plots.calibration("calibration", found.calibration), about)


def add_mistakes(body: Body, run: Run, mistakes: Sequence[Mistake], source: Source | None) -> None:
    """Add the most confident errors, as previews if there are images, else as a table."""
    if not mistakes:
        return
    names = run.config.class_names
    body.wide.append(
        '<h2>Most confidently wrong</h2>\n<p class="quiet">The wrong predictions of largest probability among the test '
        "images. Some of them may be labelled wrongly.</p>"
    )
    if source is None or isinstance(source, ArrayEmbeddings) or not _holds(source, mistakes):
        rows = [(one.image, names[one.label], names[one.predicted], percent(one.probability)) for one in mistakes]
        body.wide.append(table(["image", "class", "taken for", "probability"], rows, numeric=(3,)))
        return
    body.wide.append(f'<div class="cards">{"".join(_card(source, one, names) for one in mistakes)}</div>')


def _holds(source: ImageSource, mistakes: Sequence[Mistake]) -> bool:
    """Whether the source still has these images at the same indices."""
    return all(one.index < len(source) and source.names[one.index] == one.image for one in mistakes)


def _card(source: ImageSource, found: Mistake, names: Sequence[str]) -> str:
    predicted, image = class_label(names[found.predicted]), escape(found.image)
    shown = preview(source, found.index, f"{found.image}: {names[found.predicted]}")
    return (
        f'<figure class="card">{shown}<figcaption><span class="class">{predicted}</span>'
        f'<span class="wrong">✗ labelled {class_label(names[found.label])}</span>{bar(found.probability)}'
        f'<span class="name" title="{image}">{image}</span></figcaption></figure>'
    )
