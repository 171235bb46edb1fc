"""Measure a classifier on one split."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltloss._deprecation import renamed_keywords
from ltloss.distributed import in_one_piece
from ltloss.errors import printable
from ltloss.training.data.batches import batches
from ltloss.training.data.embeddings import Source
from ltloss.training.data.images import Split
from ltloss.training.data.sources import absolute, check_same_classes, has_own_splits
from ltloss.training.measure.class_groups import Thresholds
from ltloss.training.measure.details import Details, DetailsAccumulator
from ltloss.training.measure.metrics import BatchResult, Metrics, MetricsAccumulator, number, percent, target_angles
from ltloss.training.model.classifier import Classifier
from ltloss.training.run.prepare import apply_limits, load_split
from ltloss.training.run.run_config import RunConfig
from ltloss.training.stored_keys import stored

BATCH_SIZE = 512
_LOGITS_AT_ONCE = 1 << 24  # logits in memory: 64 MiB of float32, however many classes there are


@torch.inference_mode()
def measure(
    classifier: Classifier,
    source: Source,
    thresholds: Thresholds,
    *,
    amp: bool = False,
    logit_offset: Tensor | None = None,
) -> Metrics:
    """The metrics on a labelled source, measured in evaluation mode; the classifier's mode is restored afterwards.

    The network computes in float32, or with ``amp`` under bfloat16 autocast. ``logit_offset`` (C,) is added to the
    logits.
    """
    found = MetricsAccumulator(classifier.config.class_counts, thresholds)
    for batch in _results(classifier, source, amp, logit_offset):
        found.add(batch)
    return found.result()


@torch.inference_mode()
def measure_in_detail(classifier: Classifier, source: Source, thresholds: Thresholds) -> tuple[Metrics, Details]:
    """The metrics as :func:`measure` returns them, and the details, in one pass.

    It keeps one number for each wrong prediction, and some for each class.
    """
    found = DetailsAccumulator(classifier.config.class_counts, thresholds)
    for batch in _results(classifier, source):
        found.add(batch)
    return found.result(source.names)


def _results(
    classifier: Classifier, source: Source, amp: bool = False, logit_offset: Tensor | None = None
) -> Iterator[BatchResult]:
    """The results on the source in its order, a few images at a time."""
    was_training = classifier.training
    classifier.eval()
    head = in_one_piece(classifier.loss)
    prototypes = head.weight
    rows = max(1, _LOGITS_AT_ONCE // len(prototypes))
    for batch in batches(source, BATCH_SIZE):
        with torch.autocast(prototypes.device.type, torch.bfloat16, enabled=amp):
            features = classifier.features(batch.images.to(prototypes.device))
        features, labels = features.float(), batch.labels.to(prototypes.device)
        for x, y in zip(torch.split(features, rows), torch.split(labels, rows), strict=True):
            logits = head.logits(x).float()
            if logit_offset is not None:
                logits += logit_offset
            total = logits.logsumexp(1)
            best, predicted = logits.max(1)
            top5 = logits.topk(min(5, len(prototypes)), dim=1).indices
            found = {
                "confidence": (best - total).exp(),
                "losses": total - logits.gather(1, y[:, None])[:, 0],
                "norms": x.norm(dim=1),
                "angles": target_angles(x, prototypes, y),
            }
            yield BatchResult(
                labels=y.cpu().numpy(),
                predicted=predicted.cpu().numpy(),
                in_top5=(top5 == y[:, None]).any(1).cpu().numpy(),
                **{name: values.double().cpu().numpy() for name, values in found.items()},
            )
    classifier.train(was_training)


@dataclass(frozen=True)
class Evaluation:
    """The metrics and details of a run on one split, as JSON and as text."""

    run: Path
    data: str
    split: Split
    config: RunConfig
    thresholds: Thresholds
    metrics: Metrics
    details: Details | None = None
    epoch: int | None = None  # whose weights were measured, at the end of a training

    def to_json(self) -> str:
        """Everything as JSON; None and numbers that are not finite become null."""
        values: dict[str, Any] = {
            "run": str(self.run),
            "data": self.data,
            "split": self.split,
            **({} if self.epoch is None else {"epoch": self.epoch}),
            "loss_name": self.config.loss,
            "backbone": self.config.backbone,
            **stored({**asdict(self.thresholds), **asdict(self.metrics)}),
            "per_class": dict(zip(self.config.class_names, self.metrics.per_class, strict=True)),
            **(self.details.stored(self.config.class_names) if self.details else {}),
        }
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        return json.dumps(finite, indent=2)

    def to_text(self) -> str:
        """Tables of the metrics, of the classes from largest to smallest, of confusions and of mistakes."""
        metrics, angle = self.metrics, self.metrics.own_angle_mean
        rows = [
            ("images", str(metrics.images)),
            ("accuracy, %", percent(metrics.accuracy)),
            *([("top-5 accuracy, %", percent(metrics.top5_accuracy))] if len(metrics.per_class) > 5 else []),
            ("balanced accuracy, %", percent(metrics.balanced_accuracy)),
            ("macro-F1, %", percent(metrics.macro_f1)),
            *((f"{words}, %", percent(getattr(metrics, name))) for name, words in self.thresholds.describe().items()),
            ("calibration error, %", percent(metrics.calibration_error)),
            ("loss", number(metrics.loss)),
            ("mean feature length", number(metrics.feature_norm_mean)),
            ("mean angle to target prototype", "–" if angle is None else f"{math.degrees(angle):.1f}°"),
        ]
        part = "all images" if self.split == "all" else f"the {self.split} split"
        title = f"{self.run} ({self.config.loss}, {self.config.backbone}) on {part} of {self.data}"
        lines = [title, *(f"  {name:<30}{value:>12}" for name, value in rows), "", *self._class_lines()]
        return "\n".join(map(printable, [*lines, *self._error_lines()]))

    def _class_lines(self, limit: int = 50) -> list[str]:
        counts, names = self.config.class_counts, self.config.class_names
        order = sorted(range(len(counts)), key=lambda c: -counts[c])
        shown = order if len(order) <= limit else [*order[: limit // 2], *order[-limit // 2 :]]
        columns = [("accuracy, %", self.metrics.per_class)]
        if self.details is not None:
            columns += [("precision, %", self.details.precision), ("F1, %", self.details.f1)]
        lines = [f"  {'class':<30}{'training':>12}" + "".join(f"{title:>14}" for title, _ in columns)]
        lines += [
            f"  {names[c][:29]:<30}{counts[c]:>12}" + "".join(f"{percent(values[c]):>14}" for _, values in columns)
            for c in shown
        ]
        if len(shown) < len(order):
            lines.append(f"  (the {limit // 2} largest and smallest of {len(order)} classes; --json lists all)")
        return lines

    def _error_lines(self, limit: int = 10) -> list[str]:
        """The largest confusions, and the wrong predictions with the largest probability."""
        if self.details is None or not self.details.confusions:
            return []
        names = self.config.class_names
        lines = ["", f"  {'largest confusions':<30}{'taken for':<30}{'images':>8}{'of the class, %':>18}"]
        lines += [
            f"  {names[found.label][:29]:<30}{names[found.predicted][:29]:<30}{found.images:>8}"
            f"{percent(found.fraction):>18}"
            for found in self.details.confusions[:limit]
        ]
        if self.details.mistakes:
            lines += ["", f"  {'most confidently wrong':<30}{'of class':<30}{'taken for':<30}{'probability, %':>16}"]
        lines += [
            f"  {found.image[-29:]:<30}{names[found.label][:29]:<30}{names[found.predicted][:29]:<30}"
            f"{percent(found.probability):>16}"
            for found in self.details.mistakes[:limit]
        ]
        return lines


@renamed_keywords(many_above="many_threshold", few_below="few_threshold")
def evaluate_run(
    run: Path,
    data: str | None = None,
    *,
    image_root: str | None = None,
    split: Split = "test",
    device: str | None = None,
    many_threshold: int | None = None,
    few_threshold: int | None = None,
) -> Evaluation:
    """Measure the checkpoint that a run uses, on the run's own data or on other data with the same classes.

    Args:
        run: the folder of a training run.
        data: other data, as for ``ltloss train``; None for the run's own.
        image_root: the folder in which the paths of a list begin; None for that of the run, of other data for that of
            the list.
        split: "test", "train" or "all". On the run's own data, "test" and "train" are the images that the run measured
            and was trained on, with its long tail and limits. Other data without splits of its own is measured whole,
            and a line on stderr says so.
        device: such as "cuda:0"; None for a GPU where there is one.
        many_threshold, few_threshold: limits of the class groups; None for those of the run.

    Raises:
        UserError: the classes differ, which the message names, or data or run cannot be used.
    """
    classifier = Classifier.load(run, device)
    config = classifier.config
    settings = config.settings
    spec = data or settings.data
    thresholds = Thresholds(
        settings.many_threshold if many_threshold is None else many_threshold,
        settings.few_threshold if few_threshold is None else few_threshold,
    )
    same_data = absolute(spec) == absolute(settings.data)
    used: Split = split if same_data or has_own_splits(spec) else "all"
    root = image_root or (settings.image_root if same_data else None)
    source = load_split(replace(settings, data=spec, image_root=root), used, config.image_shape)
    check_same_classes(config.class_names, source.class_names, f"run {run}", spec)
    if same_data:
        source = apply_limits(source, settings, split)
    if used != split:
        print(f"ltloss: {spec} has no {split} split of its own, so all of it is measured", file=sys.stderr)
    metrics, details = measure_in_detail(classifier, source, thresholds)
    return Evaluation(run, spec, used, config, thresholds, metrics, details)
