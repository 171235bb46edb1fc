"""Classify images or embeddings with a trained run: write a table, and for images a gallery page and sorted copies."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ltloss._deprecation import renamed_fields
from ltloss._files import write_file
from ltloss.errors import UserError, check_counts
from ltloss.training.data.batches import batches
from ltloss.training.pages.gallery import UNCERTAIN_BELOW, Gallery, Predictions, folder_address, write_gallery
from ltloss.training.predict.output_folder import output_folder
from ltloss.training.predict.sort_images import Sorter
from ltloss.training.run.progress import progress_bar

if TYPE_CHECKING:
    from ltloss.training.data.embeddings import Source
    from ltloss.training.data.images import FolderImages, ImageSource
    from ltloss.training.model.classifier import Classifier

_TABLE, _GALLERY, _SKIPPED, _SORTED = "predictions.csv", "gallery.html", "skipped.csv", "sorted.csv"
_MANIFEST = "prediction.json"
_WRITTEN = (_TABLE, _GALLERY, _SKIPPED, _SORTED, "previews-*")
_LOGITS_AT_ONCE = 1 << 22  # logits in memory: 16 MiB of float32, however many classes there are


@renamed_fields(pictures="images")
@dataclass(frozen=True)
class PredictionSummary:
    """The results of a prediction; the command line prints ``str()`` of it."""

    out: Path
    table: Path
    gallery: Path | None  # None for embeddings
    images: int  # images or embeddings that were classified
    classes: int  # classes that were predicted
    uncertain: int  # predictions with a probability below 0.5
    skipped: int  # files that could not be read
    sorted_into: Path | None

    def __str__(self) -> str:
        lines = [
            f"{self.images:,} {'images' if self.gallery else 'embeddings'} classified into {self.classes:,} classes, "
            f"{self.uncertain:,} of them uncertain (below {UNCERTAIN_BELOW:.0%})"
        ]
        if self.skipped:
            lines.append(f"{self.skipped:,} files could not be read, see {self.out / _SKIPPED}")
        if self.sorted_into is not None:
            lines.append(f"copies sorted into {self.sorted_into}")
        return "\n".join([*lines, f"table: {self.table}", *([f"open {self.gallery}"] if self.gallery else [])])


def _probabilities(
    classifier: Classifier, features: torch.Tensor, index: torch.Tensor, logits_at_once: int
) -> torch.Tensor:
    """Softmax probabilities (B, K) of the classes ``index``; the logits exist for a few rows at a time only."""
    rows = max(1, logits_at_once // len(classifier.config.class_names))
    pieces = []
    for start in range(0, len(features), rows):
        logits = classifier.loss.logits(features[start : start + rows]).double()
        wanted = logits.gather(1, index[start : start + rows])
        pieces.append((wanted - logits.logsumexp(1, keepdim=True)).exp())
    return torch.cat(pieces)


def check_finite(features: torch.Tensor, names: Sequence[str]) -> None:
    """Raise UserError that names the first sample with a feature that is not finite."""
    finite = features.isfinite().all(1)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0, 0])
        raise UserError(
            f"the model gives a feature that is not finite for {names[first]!r}; "
            "train it again, with a lower learning rate if its training diverged"
        )


@torch.inference_mode()
def classify(
    classifier: Classifier,
    source: Source,
    *,
    top: int = 2,
    batch_size: int = 256,
    logits_at_once: int = _LOGITS_AT_ONCE,
) -> Predictions:
    """The ``top`` best classes of every sample of ``source``, or all classes if there are fewer.

    At most ``logits_at_once`` logits are in memory, but at least those of one sample.

    Raises:
        UserError: a feature is not finite, as after a training that diverged.
    """
    k = min(top, len(classifier.config.class_names))
    classifier.eval()
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    done = 0
    with progress_bar(len(source), what="image") as progress:
        for batch in batches(source, batch_size):
            features = classifier.features(batch.images).float()
            check_finite(features, source.names[done : done + len(features)])
            best = classifier.loss.predict(features, k)
            probability = _probabilities(classifier, features, best.index, logits_at_once)
            angle = best.cosine[:, 0].double().clamp(-1, 1).acos().rad2deg()
            parts.append((best.index.cpu(), probability.cpu(), angle.cpu()))
            done += len(features)
            progress.update(len(features))
    return Predictions(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def _write_table(path: Path, header: list[str], rows: Iterable[Sequence[str]]) -> None:
    # surrogateescape: file names that are not UTF-8 come out as the bytes they are
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)


def _prediction_header(ranks: int, what: str) -> list[str]:
    header = [what, "class", "probability", "angle_degrees", "runner_up", "runner_up_probability"]
    return header + [name for rank in range(3, ranks + 1) for name in (f"class_{rank}", f"probability_{rank}")]


def _prediction_rows(predictions: Predictions, source: Source, class_names: tuple[str, ...]) -> Iterator[list[str]]:
    for name, index, probability, angle in zip(
        source.names, predictions.index, predictions.probability, predictions.angle, strict=True
    ):
        ranked = [cell for c, p in zip(index, probability, strict=True) for cell in (class_names[c], f"{p:.6g}")]
        ranked += [""] * (4 - len(ranked))  # a single class has no runner-up
        yield [name, *ranked[:2], f"{angle:.3f}", *ranked[2:]]


def _sort(source: ImageSource, images: Path, sorter: Sorter, predictions: Predictions) -> Iterator[list[str]]:
    """Copy every image into the folder of its class, and yield a row (image, class, copy) for each."""
    best = predictions.index[:, 0].tolist()
    copies = sorter.sort([images / name for name in source.names], best)
    for name, index, copy in zip(source.names, best, copies, strict=True):
        yield [name, sorter.class_names[index], copy.relative_to(sorter.root).as_posix()]


def _write_predictions(
    table: Path, source: Source, predictions: Predictions, class_names: tuple[str, ...], what: str
) -> None:
    header = _prediction_header(predictions.index.shape[1], what)
    _write_table(table, header, _prediction_rows(predictions, source, class_names))


def _write_outputs(
    staging: Path, source: FolderImages, gallery: Gallery, predictions: Predictions, class_names: tuple[str, ...]
) -> None:
    table = staging / _TABLE
    _write_predictions(table, source, predictions, class_names, "image")
    _write_table(staging / _SKIPPED, ["image", "reason"], source.skipped)
    # Each set of previews has its own folder name, so an older page works until the newer one has replaced it.
    previews = "previews-" + hashlib.sha256(table.read_bytes()).hexdigest()[:12]
    write_gallery(staging / _GALLERY, predictions, source, gallery, folder=previews)


def _labels_by_folder(names: Sequence[str], class_names: tuple[str, ...]) -> np.ndarray:
    """Labels (N,) from the folders of the images if all of these are named like classes; else -1 for all."""
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = [numbers.get(Path(name).parts[0], -1) if len(Path(name).parts) > 1 else -1 for name in names]
    return np.array(labels if -1 not in labels else [-1] * len(names), dtype=np.int64)


def _refuse_nested(images: Path, out: Path, sort_into: Path | None) -> None:
    """Refuse folders inside each other: output would become input of the next prediction, or be replaced by it."""
    inside = [("--out", out, "the images", images)]
    if sort_into is not None:
        inside += [("--sort-into", sort_into, "the images", images), ("--sort-into", sort_into, "--out", out)]
        inside += [("--images", images, "--sort-into", sort_into)]
    for name, folder, other_name, other in inside:
        if folder.resolve().is_relative_to(other.resolve()):
            raise UserError(f"{name} {folder} lies inside {other_name} {other}; choose a folder outside of it")


def predict_folder(
    run: Path,
    images: Path,
    out: Path,
    *,
    sort_into: Path | None = None,
    top: int = 2,
    device: str | None = None,
    batch_size: int = 256,
    overwrite: bool = False,
) -> PredictionSummary:
    """Classify every image below ``images`` with the checkpoint that ``run`` uses.

    Writes into ``out``:

        predictions.csv   image, class, probability, angle_degrees, runner_up, runner_up_probability
        gallery.html      every image under its predicted class
        skipped.csv       image, reason
        prediction.json   what was classified
        sorted.csv        image, class, copy; only with ``sort_into``

    The files appear when all of them are complete. If the images lie in folders named like the classes, the gallery
    marks those that were classified otherwise.

    Args:
        run: the folder of a training run.
        images: a folder with images, at any depth.
        out: the folder for the results.
        sort_into: a folder for copies of the images, ``sort_into/<class>/``. The copies appear when all are complete. A
            copy that an earlier prediction made is not made again, and no file is overwritten.
        top: how many classes per image the table has, at least 1; the best and the runner-up are always there.
        device: where to run, such as "cuda:0"; None for a GPU where there is one.
        batch_size: images at a time.
        overwrite: replace the results of an earlier prediction in ``out``, which is refused otherwise.

    Returns:
        Paths and counts.

    Raises:
        UserError: a folder is missing, has no readable image, cannot be written to, holds other files, or earlier
            results without ``overwrite``.
    """
    from ltloss.training.data.sources import load_images
    from ltloss.training.model.classifier import Classifier

    check_counts(top=top, batch_size=batch_size)
    _refuse_nested(images, out, sort_into)
    with output_folder(out, _MANIFEST, _WRITTEN, overwrite=overwrite) as staging:
        classifier = Classifier.load(run, device)
        class_names, shape = classifier.config.class_names, classifier.config.image_shape
        if len(shape) != 3:
            raise UserError(f"run {run} takes embeddings of {shape[0]} features; give --data FEATURES, not --images")
        source = load_images(images, (shape[0], shape[1], shape[2]))
        source = replace(source, labels=_labels_by_folder(source.names, class_names))
        predictions = classify(classifier, source, top=max(top, 2), batch_size=batch_size)
        origin = f"{len(source):,} images of {images}, classified by {run} ({classifier.config.loss} loss)"
        address = folder_address(images.resolve(), out.resolve())
        gallery = Gallery(f"Predictions of {run.resolve().name}", origin, class_names, source.skipped, address)
        _write_outputs(staging, source, gallery, predictions, class_names)
        if sort_into is not None:
            sorter = Sorter(sort_into, class_names)
            copies = _sort(source, images, sorter, predictions)
            _write_table(staging / _SORTED, ["image", "class", "copy"], copies)
        record = {"run": str(run), "images": str(images), "pictures": len(source), "skipped": len(source.skipped)}
        write_file(staging / _MANIFEST, (json.dumps(record, indent=2) + "\n").encode())
    return _summary(out, predictions, out / _GALLERY, len(source.skipped), sort_into)


def predict_embeddings(
    run: Path,
    data: Path,
    out: Path,
    *,
    top: int = 2,
    device: str | None = None,
    batch_size: int = 256,
    overwrite: bool = False,
) -> PredictionSummary:
    """Classify every embedding of the file ``data`` with the checkpoint of a ``run`` that was trained on embeddings.

    Writes ``out/predictions.csv`` as :func:`predict_folder` does, with ``embedding`` as its first column, and
    ``out/prediction.json``. Labels in the file are ignored.

    Args:
        run: the folder of a training run.
        data: a file of embeddings as for ``ltloss train``; it needs no labels.
        out: the folder for the results.
        top: how many classes per embedding the table has, at least 1; the best and the runner-up are always there.
        device: where to run, such as "cuda:0"; None for a GPU where there is one.
        batch_size: embeddings at a time.
        overwrite: replace the results of an earlier prediction in ``out``, which is refused otherwise.

    Returns:
        Paths and counts.

    Raises:
        UserError: the run takes images or embeddings of another length, ``data`` cannot be used, ``out`` cannot be
            written to, holds other files, or earlier results without ``overwrite``.
    """
    from ltloss.training.data.embeddings import load_rows
    from ltloss.training.model.classifier import Classifier

    check_counts(top=top, batch_size=batch_size)
    with output_folder(out, _MANIFEST, _WRITTEN, overwrite=overwrite) as staging:
        classifier = Classifier.load(run, device)
        class_names, shape = classifier.config.class_names, classifier.config.image_shape
        if len(shape) != 1:
            raise UserError(f"run {run} takes images of shape {shape}; give --images FOLDER, not --data")
        source = load_rows(data)
        if source.shape != shape:
            held = f"{data} holds embeddings of {source.shape[0]} features"
            raise UserError(f"{held}, run {run} takes {shape[0]}; give other data")
        predictions = classify(classifier, source, top=max(top, 2), batch_size=batch_size)
        _write_predictions(staging / _TABLE, source, predictions, class_names, "embedding")
        record = {"run": str(run), "data": str(data), "embeddings": len(source)}
        write_file(staging / _MANIFEST, (json.dumps(record, indent=2) + "\n").encode())
    return _summary(out, predictions)


def _summary(
    out: Path, predictions: Predictions, gallery: Path | None = None, skipped: int = 0, sorted_into: Path | None = None
) -> PredictionSummary:
    best = predictions.probability[:, 0]
    return PredictionSummary(
        out=out,
        table=out / _TABLE,
        gallery=gallery,
        images=len(best),
        classes=len(np.unique(predictions.index[:, 0])),
        uncertain=int((best < UNCERTAIN_BELOW).sum()),
        skipped=skipped,
        sorted_into=sorted_into,
    )
