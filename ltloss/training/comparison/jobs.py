"""One training of a comparison, as a job whose result is one file, which is whole or absent."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltloss._files import write_file
from ltloss.errors import DivergedError, UserError
from ltloss.functional import nearest_prototype
from ltloss.training.comparison.second_stage import ClassifierRetraining, normalize_weights, post_hoc_offset
from ltloss.training.data.embeddings import Source
from ltloss.training.data.images import ArrayImages, on_device
from ltloss.training.data.splits import keep_per_class
from ltloss.training.measure.evaluate import measure
from ltloss.training.model.classifier import Classifier, choose_device
from ltloss.training.model.weights import weights_file
from ltloss.training.run.checkpoint import read_tensors, to_bytes
from ltloss.training.run.prepare import TrainingData, apply_limits, load_split, prepare_data, run_config
from ltloss.training.run.settings import FUSED_SETTINGS, OF_A_RUN, Settings
from ltloss.training.run.trainer import Trainer
from ltloss.training.stored_keys import stored

# Settings that are not part of a key. The images are in it by their checksum, and class groups are computed later from
# the accuracies of the classes.
MAY_DIFFER = ("data", "image_root", "device", "workers", "many_threshold", "few_threshold", *FUSED_SETTINGS, *OF_A_RUN)
# Settings that came later, with their former behaviour: they are in the key only if they differ from it, so that
# earlier results keep their keys.
_ADDED = {"optimizer": "sgd", "clip_norm": None, "accumulate": 1, "ema": 0.0, "head": "linear", "init_from": None}
_FORMAT = 2  # increase it if the same settings come to mean something else

_DATA_SETTINGS = (
    *("data", "image_root", "imbalance", "image_size", "channels"),
    *("limit_per_class", "limit_test", "data_seed", "workers"),
)
VALIDATION_FRACTION = 0.2


@dataclass(frozen=True)
class Job:
    """What to train, and on which images.

    Attributes:
        settings: all settings of the training, as ``Settings`` takes them.
        fingerprint: checksum of the images.
        validation_per_class: images of each class that are held out and measured; None measures the test split.
        second_stage: settings of a second stage, by name; empty for a training.
        base: the job of the first stage, whose network a second stage begins with.
        keep_model: whether to store the network, because a second stage needs it.
    """

    settings: Mapping[str, Any]
    fingerprint: str
    validation_per_class: int | None = None
    second_stage: Mapping[str, Any] = field(default_factory=dict)
    base: Job | None = None
    keep_model: bool = False

    @property
    def key(self) -> str:
        """A name that two jobs share if and only if they compute the same result."""
        values = asdict(Settings(**self.settings))
        facts = stored({name: value for name, value in values.items() if name not in _left_out(values)})
        facts["loss_options"] = {name: _number(value) for name, value in facts["loss_options"].items()}
        if values["init_from"] is not None:
            facts["init_from"] = _checksum(weights_file(Path(values["init_from"])))
        second_stage = {name: _number(value) for name, value in self.second_stage.items()}
        known = [_FORMAT, facts, self.fingerprint, self.validation_per_class, second_stage]
        known.append(self.base.key if self.base else None)
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
        return f"{self.settings['loss']}-seed{self.settings['seed']}-{digest}"

    def result_file(self, out: Path) -> Path:
        """The file of the result."""
        return out / "runs" / f"{self.key}.json"

    def model_file(self, out: Path) -> Path:
        """The file of the network, if ``keep_model``."""
        return out / "models" / f"{self.key}.safetensors"

    def result(self, out: Path) -> dict[str, Any] | None:
        """The result, or None if it has yet to be computed."""
        try:
            result = json.loads(self.result_file(out).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(result, dict) or not {"last", "best", "failed"} <= set(result):
            return None
        lacks_model = self.keep_model and not result["failed"] and not self.model_file(out).is_file()
        return None if lacks_model else result


def _left_out(values: Mapping[str, Any]) -> set[str]:
    """Names of the settings that are not part of a key."""
    return {*MAY_DIFFER, *(name for name, former in _ADDED.items() if values[name] == former)}


def _checksum(file: Path) -> str:
    """A checksum of the bytes of a file, which are read again only if its date or size is another one."""
    state = file.stat()
    return _checksum_at(file, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _checksum_at(file: Path, _date: int, _size: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _number(value: Any) -> Any:
    """Whole numbers as floats, so that a weight of 0 and one of 0.0 are one training."""
    return float(value) if type(value) is int else value


def run_job(job: Job, out: Path) -> None:
    """Compute a job and write its result; that a training diverged is a result too."""
    settings = Settings(**job.settings)
    device = choose_device(settings.device)
    data = comparison_data(settings, job.validation_per_class, device)
    found: dict[str, Any] = {"history": [], "last": None, "best": None, "seconds_per_epoch": None, "angles": None}
    found["failed"], start = None, time.perf_counter()
    try:
        if job.base is None:
            classifier = _trained(Trainer(data.config, data.train, device, measure_amp=True), data, found)
        else:
            classifier = _second_stage(job, job.base, out, data, device, found)
        found["angles"] = prototype_angles(classifier.loss.weight)
        if job.keep_model:
            write_file(job.model_file(out), to_bytes(classifier.state_dict()))
    except DivergedError as error:
        found["failed"] = error.what  # without its advice, which concerns single runs
    facts = {
        "settings": stored(asdict(settings)),
        "stage_two": dict(job.second_stage),
        "validation_per_class": job.validation_per_class,
        "class_counts": data.config.class_counts,
        "pictures": [len(data.train), len(data.test)],
        "seconds": round(time.perf_counter() - start, 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": dict(data.config.versions),
    }
    write_file(job.result_file(out), (json.dumps({**found, **facts}) + "\n").encode())


def _trained(trainer: Trainer, data: TrainingData, found: dict[str, Any]) -> Classifier:
    found["history"] = trainer.history
    for epoch in range(1, trainer.settings.epochs + 1):
        row = trainer.run_epoch(epoch, data.test)
        if row["test_accuracy"] is not None and trainer.measured is not None:
            found["last"] = {"epoch": epoch, **stored(asdict(trainer.measured))}
            if found["best"] is None or row["test_accuracy"] > found["best"]["accuracy"]:
                found["best"] = found["last"]
    found["seconds_per_epoch"] = round(statistics.median(trainer.train_seconds), 4)
    return trainer.kept


def _second_stage(
    job: Job, base: Job, out: Path, data: TrainingData, device: torch.device, found: dict[str, Any]
) -> Classifier:
    first = base.result(out)
    if first is not None and first["failed"]:
        raise DivergedError(f"the first stage diverged: {first['failed']}")
    weights = read_tensors(base.model_file(out))
    settings, given = data.config.settings, job.second_stage
    if "crt_epochs" in given:
        retrained = replace(settings, epochs=given["crt_epochs"], lr=given["crt_lr"], schedule="cosine", mixup=0.0)
        config = replace(data.config, settings=retrained)
        return _trained(ClassifierRetraining(config, data.train, device, weights, measure_amp=True), data, found)
    classifier = Classifier(data.config)
    classifier.load_state_dict(weights)
    classifier.to(device)
    offset: Tensor | None = None
    if "post_hoc_tau" in given:
        offset = post_hoc_offset(data.config.class_counts, given["post_hoc_tau"]).to(device)
    else:
        normalize_weights(classifier, given["norm_power"])
    metrics = measure(classifier, data.test, settings.thresholds, amp=bool(settings.amp), logit_offset=offset)
    found["last"] = {"epoch": settings.epochs, **stored(asdict(metrics))}
    return classifier


def prototype_angles(prototypes: Tensor) -> dict[str, float] | None:
    """Smallest and mean angle, in degrees, between prototypes (C, D) and their nearest others; None for one class."""
    if len(prototypes) < 2:
        return None
    cosine = nearest_prototype(prototypes.detach().float()).cosine.double().clamp(-1, 1)
    angles = cosine.acos() * (180 / math.pi)
    return {"min": angles.min().item(), "mean": angles.mean().item()}


def comparison_data(settings: Settings, validation_per_class: int | None, device: torch.device) -> TrainingData:
    """The training split, and the test split or, if ``validation_per_class`` is given, a validation split.

    A validation split holds so many images of every class of the training file, but at most half of a class. The long
    tail is cut from the rest. Images in memory are moved to the device.
    """
    facts = {name: getattr(settings, name) for name in _DATA_SETTINGS}
    data = _loaded(json.dumps({**facts, "data_seed": settings.split_seed}), validation_per_class, str(device))
    return replace(data, config=replace(data.config, settings=settings))


@lru_cache(maxsize=1)
def _loaded(data_settings: str, validation_per_class: int | None, device: str) -> TrainingData:
    settings = Settings(**json.loads(data_settings))
    data = prepare_data(settings) if validation_per_class is None else _held_out(settings, validation_per_class)
    place = torch.device(device)
    # Images in files and embeddings stay where they are.
    train, test = (
        on_device(source, place) if isinstance(source, ArrayImages) else source for source in (data.train, data.test)
    )
    return replace(data, train=train, test=test)


def _held_out(settings: Settings, per_class: int) -> TrainingData:
    whole = load_split(settings, "train")
    validation = validation_indices(whole.labels, per_class, settings.split_seed)
    rest = whole.subset(np.setdiff1d(np.arange(len(whole)), validation))
    # The rest may be too small for the whole imbalance: 12 images a class allow 12 at most, not 15.
    largest = int(np.bincount(rest.labels).max())
    train = apply_limits(rest, replace(settings, imbalance=min(settings.imbalance, largest)), "train")
    return TrainingData(train, whole.subset(validation), run_config(settings, train))


def validation_indices(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Sorted indices of ``per_class`` random images of each class of labels (N,), at most half of any class."""
    held = np.minimum(per_class, np.bincount(labels) // 2)
    if not held.any():
        raise UserError("no class has two training images, so none can be held out to tune on; leave --tune out")
    return keep_per_class(labels, held, seed, "validation")


def default_validation(labels: np.ndarray) -> int:
    """Images per class to hold out of a training file with labels (N,): a fifth of the smallest class, at least 1."""
    return max(1, round(VALIDATION_FRACTION * int(np.bincount(labels).min())))


def fingerprint(source: Source) -> str:
    """A checksum of labels and pixels or embeddings; for images in files, of labels, names and bytes."""
    return f"{source.checksum(zlib.crc32(np.ascontiguousarray(source.labels).data)):08x}"


def validate_job(job: Job) -> Job:
    """Return the job; UserError if its settings, loss options or second stage are not valid."""
    from ltloss.training.model.registry import loss_arguments

    settings = Settings(**job.settings)
    loss_arguments(settings.loss, settings.all_loss_options)
    for name, value in job.second_stage.items():
        whole = name == "crt_epochs"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not value >= whole:
            raise UserError(f"{name} must be {'an integer >= 1' if whole else 'a number >= 0'}; got {value!r}")
    return job
