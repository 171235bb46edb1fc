"""The parts of the report about geometry: lengths of features, angles between prototypes, and a map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ltloss.distributed import in_one_piece
from ltloss.functional import nearest_prototype
from ltloss.training.data.batches import batches
from ltloss.training.data.embeddings import Source
from ltloss.training.measure.confusion import classes_to_look_at
from ltloss.training.measure.details import Details
from ltloss.training.measure.feature_map import feature_map, sample_for_map, seen_by_the_loss
from ltloss.training.model.classifier import Classifier
from ltloss.training.pages import classifier_plots, plots
from ltloss.training.pages.html import details, table
from ltloss.training.pages.run_files import Run
from ltloss.training.pages.sections import ROWS, Body

_ALL_PROTOTYPES = 200  # classes up to which the map shows all prototypes, else only those of the marked classes


@dataclass(frozen=True)
class Sampled:
    """Features (M, D) of test images with labels (M,), with more images of the classes ``marked``.

    The mask ``even`` (M,) selects a sample that is spread evenly over all test images.
    """

    features: Tensor
    labels: np.ndarray
    even: np.ndarray
    marked: Sequence[int]


@torch.inference_mode()
def sample_features(classifier: Classifier, source: Source, found: Details | None) -> Sampled | None:
    """The features for lengths and map. The marked classes are those of the largest confusions in ``found``."""
    if not len(source):
        return None
    marked = _classes_to_mark(found)
    numbers, even = sample_for_map(source.labels, marked)
    features = torch.cat([classifier.features(part.images).float().cpu() for part in batches(source, 256, numbers)])
    return Sampled(features, source.labels[numbers], even, marked)


def _classes_to_mark(found: Details | None) -> list[int]:
    """The classes of the largest confusions, then those with the most test images."""
    if found is None:
        return []
    pairs = [(pair.label, pair.predicted) for pair in found.confusions]
    return classes_to_look_at(pairs, np.array(found.class_images), classifier_plots.MARKED)


def add_lengths(body: Body, sampled: Sampled) -> None:
    """Add the lengths of the features."""
    lengths = sampled.features.norm(dim=1).numpy()[sampled.even]
    finite = _only_finite(body, lengths, "Feature lengths", "test images")
    if len(finite):
        plot = plots.histogram("lengths", "Feature lengths", finite, axis="length ‖x‖ (no unit)", what="test images")
        body.add(plot, f"Of {len(finite):,} test images, before normalisation.")


def add_map(body: Body, run: Run, classifier: Classifier, sampled: Sampled, method: str) -> None:
    """Add the map of images and prototypes; ``method`` as for ``feature_map``."""
    names, head, marked = run.config.class_names, in_one_piece(classifier.loss), sampled.marked
    classes = range(len(names)) if len(names) <= _ALL_PROTOTYPES else marked
    seen = seen_by_the_loss(head, sampled.features, classes)
    points, prototypes, owner = (tensor.numpy() for tensor in seen)
    if not np.isfinite(points).all(1).any():  # add_lengths has said so on the page
        return
    body.feature_map = found = feature_map(points, sampled.labels, prototypes, owner, method)
    about = (
        f"{len(found.images):,} test images, and class prototypes (large), as the loss sees them. In colour: the "
        "classes of the largest confusions. "
    )
    if found.method == "UMAP":
        about += "UMAP shows who is near whom; distances between far groups mean little."
    else:
        about += "The two directions in which the images differ most; classes apart in others may overlap here."
    body.add(classifier_plots.map_of_features("map", found, marked, names), about)


def _only_finite(body: Body, values: np.ndarray, title: str, what: str) -> np.ndarray:
    """The finite values; the page says how many are not."""
    finite: np.ndarray = values[np.isfinite(values)]
    if len(finite) < len(values):
        body.missing.append(
            f"{title}: {len(values) - len(finite):,} of {len(values):,} {what} have a value that is not finite, so the "
            "training diverged; train again with a lower learning rate."
        )
    return finite


def add_prototypes(body: Body, run: Run, classifier: Classifier) -> None:
    """Add the angles between nearest prototypes, and a table of the closest."""
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
    rows = [(names[a], names[b], f"{angle:.1f}°") for (a, b), angle in list(pairs.items())[:ROWS]]
    content = table(["class", "and", "angle"], rows, numeric=(2,))
    body.tables.append(details("The closest prototypes", content, opened=True))
