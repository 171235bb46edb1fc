"""The training loop: one checkpoint an epoch, resumable at any moment."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltloss._files import remove_leftovers, write_file
from ltloss.class_balance import DeferredWeights, effective_number_weights
from ltloss.distributed import clip_grad_norm_
from ltloss.distributed.layout import local
from ltloss.errors import UserError
from ltloss.optim.prototype_optimizer import PrototypeOptimizer
from ltloss.soft_labels import takes_soft_labels
from ltloss.training.data.batches import augment, batch_count, batches
from ltloss.training.data.embeddings import Source
from ltloss.training.data.mixup import mix
from ltloss.training.data.randaugment import rand_augment
from ltloss.training.measure.evaluate import Evaluation, measure, measure_in_detail
from ltloss.training.measure.metrics import COLUMNS, Metrics
from ltloss.training.model.classifier import Classifier, check_tensors
from ltloss.training.model.start import start_from
from ltloss.training.run.average import WeightAverage
from ltloss.training.run.checkpoint import (
    Checkpoint,
    checkpoint_path,
    load_checkpoint,
    read_tensors,
    save_checkpoint,
)
from ltloss.training.run.divergence import all_usable, check_finite, diverged
from ltloss.training.run.early_stopping import best_epoch, is_over
from ltloss.training.run.lock import owned
from ltloss.training.run.optimizer_state import load_state, set_steps, state_tensors
from ltloss.training.run.optimizers import build_optimizers
from ltloss.training.run.prepare import prepare_data
from ltloss.training.run.progress import EpochProgress
from ltloss.training.run.ranks import (
    Ranks,
    common_checkpoint,
    copy_to_shard,
    gather_full,
    process_group,
    wrap_distributed,
)
from ltloss.training.run.run_config import RunConfig
from ltloss.training.run.run_folder import (
    check_same_data,
    check_still_new,
    device_of_run,
    open_run,
    write_config,
    write_metrics,
)
from ltloss.training.run.schedules import first_epoch, learning_rate
from ltloss.training.run.tensorboard import Scalars, check_tensorboard
from ltloss.training.seeds import derived_seed, numpy_generator, torch_generator, torch_seeded

_Mixing = tuple[np.random.Generator, np.random.Generator]  # of the fractions, and of the partners
_CHECK_EVERY = 20  # steps between looks at the losses: each look makes a GPU wait


@dataclass(frozen=True)
class TrainingResult:
    """The results of a finished run; ``history`` holds the rows of metrics.csv."""

    run: Path
    evaluation: Evaluation  # of the test split, with the weights that are kept
    history: list[dict[str, Any]]
    ranks: Ranks


def train(out: Path, given: Mapping[str, Any], *, resume: bool = False, quiet: bool = False) -> TrainingResult:
    """Train with the settings ``given``, and write the run folder ``out``.

    A run that was killed at any moment and continued with ``resume`` takes the same steps as one that was not.

    Raises UserError if the settings, the data or ``out`` cannot be used, before anything is written; and later
    DivergedError if the loss becomes NaN or infinite.
    """
    settings, stored = open_run(out, given, resume)
    if settings.tensorboard:
        check_tensorboard()
    with process_group(settings.parallel, device_of_run(settings, given)) as (ranks, device):
        data = prepare_data(settings, stored.image_shape if stored is not None and stored.of_embeddings else None)
        if stored is not None:
            check_same_data(stored, data.config, out)
        # Before the checkpoint is looked for: whoever owned the folder has written its last one.
        with owned(out) if ranks.first else nullcontext():
            if ranks.first and stored is None:
                check_still_new(out)
            checkpoint = common_checkpoint(out, ranks)
            trainer = Trainer(
                data.config, data.train, device, ranks, validation=data.validation, fresh=checkpoint is None
            )
            config = data.config.in_force(amp=trainer.amp)
            if checkpoint is not None:
                trainer.restore(checkpoint)
            if ranks.first:
                remove_leftovers(out, "config.json", "metrics.csv", "evaluation.json")
                remove_leftovers(out / "checkpoints", "epoch-")
                write_config(out, config)
                if trainer.history:
                    write_metrics(out, trainer.history)
            _run_epochs(trainer, data.test, out, quiet or not ranks.first)
            epoch = len(trainer.history)
            if settings.early_stopping is not None:
                epoch = best_epoch(trainer.history)
                trainer.take_best(out)
            measured = measure_in_detail(trainer.kept, data.test, settings.thresholds)
            evaluation = Evaluation(out, settings.data, "test", config, settings.thresholds, *measured, epoch)
            if ranks.first:
                write_file(out / "evaluation.json", evaluation.to_json().encode())
            return TrainingResult(out, evaluation, trainer.history, ranks)


def _run_epochs(trainer: Trainer, test: Source, out: Path, quiet: bool) -> None:
    """Run the epochs that are left; write the checkpoint and the metrics after each."""
    settings = trainer.settings
    with ExitStack() as opened:
        progress = opened.enter_context(closing(EpochProgress(settings.epochs, quiet=quiet)))
        told: list[EpochProgress | Scalars] = [progress]
        if settings.tensorboard and trainer.ranks.first:
            told.append(opened.enter_context(closing(Scalars(out, trainer.history))))
        for epoch in range(len(trainer.history) + 1, settings.epochs + 1):
            if is_over(trainer.history, settings.early_stopping):
                break
            row = trainer.run_epoch(epoch, test, progress)
            checkpoint = trainer.checkpoint()
            if trainer.ranks.first:
                save_checkpoint(out, epoch, checkpoint)
                write_metrics(out, trainer.history)
            for each in told:
                each.end(row)


class Trainer:
    """The state that training changes: the classifier, its optimizers and the history of the epochs so far."""

    def __init__(
        self,
        config: RunConfig,
        source: Source,
        device: torch.device,
        ranks: Ranks | None = None,
        *,
        measure_amp: bool = False,
        validation: Source | None = None,
        fresh: bool = True,
    ) -> None:
        self.settings = config.settings
        self.source, self.validation = source, validation
        self.device = device
        self.ranks = ranks or Ranks()
        if len(source) < 2 * self.ranks.count:
            raise UserError(f"{len(source)} training images are too few for {self.ranks.count} processes; start fewer")
        self.step_size = self.settings.batch_size * self.settings.accumulate
        self.steps = batch_count(len(source), self.step_size, self.ranks.count)
        # Backward passes of a step, alike on all ranks; none has a single image, which batch normalisation cannot use.
        smallest = len(source) // self.steps // self.ranks.count
        self.parts = max(1, min(self.settings.accumulate, smallest // 2))
        self.amp = device.type == "cuda" if self.settings.amp is None else self.settings.amp
        self.measure_amp = measure_amp and self.amp
        with torch_seeded(derived_seed(self.settings.seed, "initial weights"), device):
            self.classifier = Classifier(config).to(device)
            if fresh:  # not to be restored
                start_from(self.classifier, source, quiet=not self.ranks.first)
        if self.amp:  # convolutions and pooling in bfloat16 are several times slower in the other layout
            self.classifier.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.features = wrap_distributed(self.classifier, self.ranks)
        self.class_weights = _deferred_weights(self.classifier, config)
        self.begin()
        self.history: list[dict[str, Any]] = []
        self.measured: Metrics | None = None  # of the test split, the last time that it was looked at
        self.train_seconds: list[float] = []  # of each epoch, without its look at the test split

    def begin(self) -> None:
        """Make the optimizers, and the average of the weights, for the classifier as it is."""
        self.optimizers = build_optimizers(self.classifier, self.settings)
        self.average = WeightAverage(self.classifier, self.settings.ema) if self.settings.ema else None

    @property
    def kept(self) -> Classifier:
        """The classifier to measure and use: the average of the weights if there is one, else the trained one."""
        return self.classifier if self.average is None else self.average.classifier

    def run_epoch(self, epoch: int, test: Source, progress: EpochProgress | None = None) -> dict[str, Any]:
        """Train epoch number ``epoch`` (from 1), measure the test split if it is due, and return the new row."""
        progress = progress or EpochProgress(self.settings.epochs)
        progress.begin(epoch, self.steps)
        start = time.perf_counter()
        dropout = derived_seed(self.settings.seed, self.ranks.purpose("dropout"), epoch)
        with torch_seeded(dropout, self.device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "gradients of the prototypes were not finite")  # looked at below
            loss, accuracy = self._train_epoch(epoch, progress)
        self.train_seconds.append(time.perf_counter() - start)
        row = {
            "epoch": epoch,
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "train_loss": loss,
            "train_accuracy": accuracy,
            **_test_columns(self._measure(test) if self._is_due(epoch) else None),
            "validation_balanced_accuracy": self._validated(),
            "seconds": round(time.perf_counter() - start, 3),
        }
        self.history.append(row)
        return row

    def _is_due(self, epoch: int) -> bool:
        return epoch % self.settings.evaluate_every == 0 or epoch == self.settings.epochs

    def _measure(self, test: Source) -> Metrics:
        self.measured = measure(self.kept, test, self.settings.thresholds, amp=self.measure_amp)
        return self.measured

    def _validated(self) -> float | None:
        """Balanced accuracy on the validation part, as the first rank finds it: ranks must agree when to stop."""
        if self.validation is None:
            return None
        found = measure(self.kept, self.validation, self.settings.thresholds, amp=self.measure_amp).balanced_accuracy
        agreed = torch.tensor(found if self.ranks.first else 0.0, dtype=torch.float64, device=self.device)
        return self.ranks.sum(agreed).item()

    def _train_epoch(self, epoch: int, progress: EpochProgress) -> tuple[float, float]:
        """Train an epoch; return mean loss and training accuracy, both measured while the weights change."""
        settings = self.settings
        self._prepare_epoch(epoch)
        generator = torch_generator(settings.seed, self.ranks.purpose("augmentation"), epoch)
        # All ranks draw alike: one fraction mixes the whole batch. Partners are drawn within each rank's part of it.
        fractions = numpy_generator(settings.seed, "mixup", epoch)
        alone = self.ranks.count == 1
        partners = fractions if alone else numpy_generator(settings.seed, self.ranks.purpose("partners"), epoch)
        losses = torch.zeros(self.steps, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        mine = {"rank": self.ranks.rank, "ranks": self.ranks.count}
        for step, batch in enumerate(batches(self.source, self.step_size, self._order(epoch), **mine)):
            images = self._augmented(batch.images, generator)
            labels = batch.labels.to(self.device)
            done = (epoch - 1) * self.steps + step
            lr = learning_rate(settings, done, settings.epochs * self.steps)
            loss, features = self._step(images, labels, (fractions, partners), lr)
            if self.average is not None:
                self.average.update(done + 1)
            losses[step] = loss
            with torch.no_grad():
                correct += (self.classifier.loss.predict(features).index[:, 0] == labels).sum()
            if (step + 1) % _CHECK_EVERY == 0 or step + 1 == self.steps:
                check_finite(losses[: step + 1], epoch, self.steps, lr)
                self._check_moved(epoch, lr)
                progress.step(losses[: step + 1].mean().item())
            else:
                progress.step()
        self._check_weights(epoch, lr)
        return losses.double().mean().item(), self.ranks.sum(correct).item() / len(self.source)

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        kind = self.settings.augment
        if kind == "randaugment":
            images, kind = rand_augment(images.cpu(), generator, self.settings.workers), "crop-flip"
        return augment(images.to(self.device), kind, generator, self.settings.crop_pad)

    def _step(self, images: Tensor, labels: Tensor, mixing: _Mixing, lr: float) -> tuple[Tensor, Tensor]:
        """Take one optimizer step; return the loss, a scalar, and features (B, D) of images (B, channels, H, W)."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
        loss, features = self._backward(images, labels, mixing)
        if self.settings.clip_norm is not None:
            clip_grad_norm_(self.classifier.parameters(), self.settings.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss, features

    def _backward(self, images: Tensor, labels: Tensor, mixing: _Mixing) -> tuple[Tensor, Tensor]:
        """Compute the gradients of a step's mean loss, part by part; return that loss and the features (B, D)."""
        others, fraction = labels, 1.0
        if self.settings.mixup:
            images, others, fraction = mix(images, labels, self.settings.mixup, *mixing)
        if self.parts == 1:
            loss, features = self._forward(images, labels, others, fraction)
            torch.autograd.backward(loss)
            return loss.detach(), features.detach()
        parts = [tensor.tensor_split(self.parts) for tensor in (images, labels, others)]
        sizes = self.ranks.sum(torch.tensor([len(part) for part in parts[1]], device=self.device))
        losses, seen = [], []
        for x, y, other, share in zip(*parts, sizes / sizes.sum(), strict=True):
            loss, features = self._forward(x, y, other, fraction)
            torch.autograd.backward(loss * share)
            losses.append(loss.detach() * share)
            seen.append(features.detach())
        return torch.stack(losses).sum(), torch.cat(seen)

    def _check_moved(self, epoch: int, lr: float) -> None:
        """Raise DivergedError if a fused update skipped steps: it skips those whose gradients are not finite."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, PrototypeOptimizer) and optimizer.skipped_steps:
                times = f"{optimizer.skipped_steps} of {self.steps} steps"
                raise diverged(f"a gradient of the prototypes was not finite in {times} of epoch {epoch}", lr)

    def _check_weights(self, epoch: int, lr: float) -> None:
        """Raise DivergedError, on all ranks, if the last step spoiled a weight, which no loss has seen yet."""
        usable = torch.stack([all_usable(local(weights)) for weights in self.classifier.parameters()])
        if self.ranks.sum((~usable).sum()).item():
            raise diverged(f"weights are NaN, infinite or beyond 2^64 after the last step of epoch {epoch}", lr)

    def _prepare_epoch(self, epoch: int) -> None:
        self.classifier.train()
        if self.class_weights is not None:
            self.classifier.loss.set_class_weight(self.class_weights(epoch - 1))  # type: ignore[operator]

    def _order(self, epoch: int) -> np.ndarray:
        """Indices of the images of an epoch, in training order."""
        return numpy_generator(self.settings.seed, "order", epoch).permutation(len(self.source))

    def _forward(self, images: Tensor, labels: Tensor, others: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
        """Loss, a scalar, and features (B, D) of images (B, channels, H, W).

        With mixup, ``labels`` count by ``fraction`` and ``others`` by the rest.
        """
        head, features = self.classifier.loss, self._features(images)
        if not self.settings.mixup:
            return head(features, labels), features
        if takes_soft_labels(head):  # both losses in one pass
            both = torch.stack([labels, others], 1)
            weight = features.new_tensor([fraction, 1 - fraction], dtype=torch.float32)
            return head(features, both, label_weight=weight.expand(both.shape)), features
        return fraction * head(features, labels) + (1 - fraction) * head(features, others), features

    def _features(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            features: Tensor = self.features(images)
        return features

    def checkpoint(self) -> Checkpoint:
        """Everything that the next epoch depends on; sharded tensors are gathered whole."""
        trained = self.classifier.state_dict()
        state: dict[str, Any] = {"epoch": len(self.history), "history": self.history}
        if self.settings.early_stopping is not None:
            state["best"] = best_epoch(self.history)
        return Checkpoint(
            model=gather_full(self.kept.state_dict()),
            optimizer=gather_full(state_tensors(self.optimizers, dict(self.classifier.named_parameters()))),
            state=state,
            trained=gather_full({} if self.average is None else trained),
        )

    def take_best(self, run: Path) -> None:
        """Load the weights of the best epoch."""
        self.ranks.wait()  # until the first one has written its last checkpoint
        tensors = read_tensors(checkpoint_path(run, best_epoch(self.history)) / "model.safetensors")
        for name, tensor in self.kept.state_dict().items():
            copy_to_shard(tensor, tensors[name])

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint folder; UserError if it is damaged or belongs to another model."""
        checkpoint = load_checkpoint(path)
        models = {"model": (self.kept, checkpoint.model)}
        if self.average is not None:
            models["trained"] = (self.classifier, checkpoint.trained)
        for name, (model, tensors) in models.items():
            check_tensors(path / f"{name}.safetensors", tensors, model.state_dict())
        parameters = dict(self.classifier.named_parameters())
        load_state(self.optimizers, parameters, checkpoint.optimizer, path / "optimizer.safetensors")
        for model, tensors in models.values():
            for name, tensor in model.state_dict().items():
                copy_to_shard(tensor, tensors[name])
        self.history = checkpoint.state["history"]
        set_steps(self.optimizers, len(self.history) * self.steps)


def _deferred_weights(classifier: Classifier, config: RunConfig) -> DeferredWeights | None:
    settings = config.settings
    if settings.drw_start is None:
        return None
    if not hasattr(classifier.loss, "set_class_weight"):
        raise UserError(f"loss {settings.loss} takes no class weights; leave --drw-start out, or choose another --loss")
    weights = effective_number_weights(config.class_counts, settings.beta)
    return DeferredWeights(weights, first_epoch(settings.drw_start, settings.epochs))


def _test_columns(metrics: Metrics | None) -> dict[str, float | None]:
    """The columns about the test split; all None if it was not measured."""
    columns = {"test_loss": "loss", "test_accuracy": "accuracy"}
    columns |= {name: name for name in COLUMNS if name in Metrics.__dataclass_fields__}
    return {column: None if metrics is None else getattr(metrics, name) for column, name in columns.items()}
