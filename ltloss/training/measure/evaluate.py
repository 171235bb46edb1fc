"""Measure a classifier on one split."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltloss._deprecation import renamed_keywords
from ltloss.distributed import in_one_piece
from ltloss.training.data.batches import batches
from ltloss.training.data.images import ImageSource, Split
from ltloss.training.data.sources import absolute, check_same_classes, has_own_splits
from ltloss.training.measure.class_groups import Thresholds
from ltloss.training.measure.metrics import Metrics, MetricsAccumulator, number, percent, target_angles
from ltloss.training.model.classifier import Classifier
from ltloss.training.run.prepare import apply_limits, load_split
from ltloss.training.run.run_config import RunConfig
from ltloss.training.stored_keys import stored

BATCH_SIZE = 512
_LOGITS_AT_ONCE = 1 << 24  # 64 MiB of float32, however many classes there are


@torch.inference_mode()
def measure(
    classifier: Classifier,
    source: ImageSource,
    thresholds: Thresholds,
    *,
    amp: bool = False,
    logit_offset: Tensor | None = None,
) -> Metrics:
    """Metrics of a labelled source in evaluation mode; the classifier's mode is restored.

    The network computes in float32, or with ``amp`` in bfloat16 autocast. ``logit_offset`` (C,) is added to the logits.
    """
    was_training = classifier.training
    classifier.eval()
    head = in_one_piece(classifier.loss)
    prototypes = head.weight
    rows = max(1, _LOGITS_AT_ONCE // len(prototypes))
    found = MetricsAccumulator(classifier.config.class_counts, thresholds)
    for batch in batches(source, BATCH_SIZE):
        with torch.autocast(prototypes.device.type, torch.bfloat16, enabled=amp):
            features = classifier.features(batch.images.to(prototypes.device))
        features, labels = features.float(), batch.labels.to(prototypes.device)
        for x, y in zip(torch.split(features, rows), torch.split(labels, rows), strict=True):
            logits = head.logits(x).float()
            if logit_offset is not None:
                logits += logit_offset
            target = logits.gather(1, y[:, None])[:, 0]
            total = logits.logsumexp(1)
            best, predicted = logits.max(1)
            found.add(
                labels=y,
                predicted=predicted,
                confidence=(best - total).exp(),
                losses=total - target,
                norms=x.norm(dim=1),
                angles=target_angles(x, prototypes, y),
            )
    classifier.train(was_training)
    return found.result()


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a run on one split, and how to show them."""

    run: Path
    data: str
    split: Split
    config: RunConfig
    thresholds: Thresholds
    metrics: Metrics

    def to_json(self) -> str:
        """Everything for machine reading; None becomes null."""
        values: dict[str, Any] = {
            "run": str(self.run),
            "data": self.data,
            "split": self.split,
            "loss_name": self.config.loss,
            "backbone": self.config.backbone,
            **stored({**asdict(self.thresholds), **asdict(self.metrics)}),
            "per_class": dict(zip(self.config.class_names, self.metrics.per_class, strict=True)),
        }
        return json.dumps(values, indent=2)

    def to_text(self) -> str:
        """A short table: the groups, the geometry, and the classes from the largest to the smallest."""
        metrics = self.metrics
        rows = [
            ("images", str(metrics.images)),
            ("accuracy, %", percent(metrics.accuracy)),
            *((f"{words}, %", percent(getattr(metrics, name))) for name, words in self.thresholds.describe().items()),
            ("calibration error, %", percent(metrics.calibration_error)),
            ("loss", number(metrics.loss)),
            ("mean feature length", number(metrics.feature_norm_mean)),
            ("mean angle to target prototype", f"{number(metrics.own_angle_mean)} rad"),
        ]
        part = "all images" if self.split == "all" else f"the {self.split} split"
        title = f"{self.run} ({self.config.loss}, {self.config.backbone}) on {part} of {self.data}"
        lines = [title, *(f"  {name:<30}{value:>12}" for name, value in rows), "", *self._class_lines()]
        return "\n".join(lines)

    def _class_lines(self, limit: int = 50) -> list[str]:
        counts = self.config.class_counts
        order = sorted(range(len(counts)), key=lambda c: -counts[c])
        shown = order if len(order) <= limit else [*order[: limit // 2], *order[-limit // 2 :]]
        lines = [f"  {'class':<30}{'training':>12}{'accuracy, %':>14}"]
        lines += [
            f"  {self.config.class_names[c][:29]:<30}{counts[c]:>12}{percent(self.metrics.per_class[c]):>14}"
            for c in shown
        ]
        if len(shown) < len(order):
            lines.append(f"  (the {limit // 2} largest and smallest of {len(order)} classes; --json lists all)")
        return lines


@renamed_keywords(many_above="many_threshold", few_below="few_threshold")
def evaluate_run(
    run: Path,
    data: str | None = None,
    *,
    split: Split = "test",
    device: str | None = None,
    many_threshold: int | None = None,
    few_threshold: int | None = None,
) -> Evaluation:
    """Measure a run's newest checkpoint on its own data, or on other data with the same classes.

    Of the run's own data, ``test`` and ``train`` are the images that the run itself measured and was trained on, with
    its long tail and limits; ``all`` is every image. Of other data that has no train and test part of its own, all
    images are measured whatever the split, and a line on stderr says so.

    Raises UserError where the classes differ (naming them), or data or run cannot be used.
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
    source = load_split(replace(settings, data=spec), used, config.image_shape)
    check_same_classes(config.class_names, source.class_names, f"run {run}", spec)
    if same_data:
        source = apply_limits(source, settings, split)
    if used != split:
        print(f"ltloss: {spec} has no {split} split of its own, so all of it is measured", file=sys.stderr)
    return Evaluation(run, spec, used, config, thresholds, measure(classifier, source, thresholds))
