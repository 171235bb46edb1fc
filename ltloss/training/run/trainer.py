"""The training loop: SGD with momentum, one checkpoint an epoch, resumable at any moment."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltloss._files import remove_leftovers, write_file
from ltloss.class_balance import DeferredWeights, effective_number_weights
from ltloss.errors import DivergedError, UserError
from ltloss.optim import PrototypeSGD
from ltloss.soft_labels import takes_soft_labels
from ltloss.training.data.batches import augment, batch_count, batches
from ltloss.training.data.images import ImageSource
from ltloss.training.data.mixup import mix
from ltloss.training.measure.evaluate import Evaluation, measure
from ltloss.training.measure.metrics import Metrics, percent
from ltloss.training.model.classifier import Classifier, check_tensors, choose_device
from ltloss.training.run.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from ltloss.training.run.lock import owned
from ltloss.training.run.optimizers import build_optimizers
from ltloss.training.run.prepare import prepare_data
from ltloss.training.run.progress import progress_bar
from ltloss.training.run.ranks import Ranks, copy_to_shard, gather_full, process_group, wrap_distributed
from ltloss.training.run.run_config import RunConfig
from ltloss.training.run.run_folder import check_same_data, check_still_new, open_run, write_config, write_metrics
from ltloss.training.run.schedules import first_epoch, learning_rate
from ltloss.training.seeds import derived_seed, numpy_generator, torch_generator

_CHECK_EVERY = 20  # steps between looks at the losses: each look makes a GPU wait


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run leaves in memory; ``history`` holds the rows of metrics.csv."""

    run: Path
    evaluation: Evaluation  # of the test split, after the last epoch
    history: list[dict[str, Any]]
    ranks: Ranks


def train(out: Path, given: Mapping[str, Any], *, resume: bool = False, quiet: bool = False) -> TrainingResult:
    """Train as the settings ``given`` say, and write the run folder ``out``.

    A run that was killed at any moment and continued with ``resume`` takes the same steps as one that was not.

    Raises UserError before anything is written where the settings, the data or ``out`` cannot be used, and later where
    the loss becomes NaN or infinite.
    """
    settings, stored = open_run(out, given, resume)
    with process_group(settings.parallel, choose_device(settings.device)) as (ranks, device):
        data = prepare_data(settings)
        if stored is not None:
            check_same_data(stored, data.config, out)
        # Before the checkpoint is looked for: whoever owned the folder has written its last one.
        with owned(out) if ranks.first else nullcontext():
            if ranks.first and stored is None:
                check_still_new(out)
            checkpoint = latest_checkpoint(out)
            trainer = Trainer(data.config, data.train, device, ranks)
            config = data.config.in_force(amp=trainer.amp)
            if checkpoint is not None:
                trainer.restore(checkpoint)
            if ranks.first:
                for folder in (out, out / "checkpoints"):
                    remove_leftovers(folder)
                write_config(out, config)
                if trainer.history:
                    write_metrics(out, trainer.history)
            _run_epochs(trainer, data.test, out, quiet or not ranks.first)
            metrics = measure(trainer.classifier, data.test, settings.thresholds)
            evaluation = Evaluation(out, settings.data, "test", config, settings.thresholds, metrics)
            if ranks.first:
                write_file(out / "evaluation.json", evaluation.to_json().encode())
            return TrainingResult(out, evaluation, trainer.history, ranks)


def _run_epochs(trainer: Trainer, test: ImageSource, out: Path, quiet: bool) -> None:
    """The epochs that are left, each with its checkpoint and its row of metrics."""
    epochs = trainer.settings.epochs
    with progress_bar(total=epochs, done=len(trainer.history), quiet=quiet) as progress:
        for epoch in range(len(trainer.history) + 1, epochs + 1):
            row = trainer.run_epoch(epoch, test)
            checkpoint = trainer.checkpoint()
            if trainer.ranks.first:
                save_checkpoint(out, epoch, checkpoint)
                write_metrics(out, trainer.history)
            progress.set_postfix(loss=f"{row['train_loss']:.3f}", test=percent(row["test_accuracy"]))
            progress.update()


class Trainer:
    """The state that training changes: the classifier, its optimizers and the history of the epochs so far."""

    def __init__(
        self,
        config: RunConfig,
        source: ImageSource,
        device: torch.device,
        ranks: Ranks | None = None,
        *,
        measure_amp: bool = False,
    ) -> None:
        self.settings = config.settings
        self.source = source
        self.device = device
        self.ranks = ranks or Ranks()
        if len(source) < 2 * self.ranks.count:
            raise UserError(f"{len(source)} training images are too few for {self.ranks.count} processes; start fewer")
        self.steps = batch_count(len(source), self.settings.batch_size, self.ranks.count)
        self.amp = device.type == "cuda" if self.settings.amp is None else self.settings.amp
        self.measure_amp = measure_amp and self.amp
        with _seeded(derived_seed(self.settings.seed, "initial weights"), device):
            self.classifier = Classifier(config).to(device)
        if self.amp:  # convolutions and pooling in bfloat16 are several times slower in the other layout
            self.classifier.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.features = wrap_distributed(self.classifier, self.ranks)
        self.class_weights = _deferred_weights(self.classifier, config)
        self.optimizers = build_optimizers(self.classifier, self.settings)
        self.history: list[dict[str, Any]] = []
        self.measured: Metrics | None = None  # of the test split, the last time that it was looked at
        self.train_seconds: list[float] = []  # of each epoch, without its look at the test split

    def run_epoch(self, epoch: int, test: ImageSource) -> dict[str, Any]:
        """Train epoch number ``epoch`` (from 1), measure the test split if it is due, and return the new row."""
        start = time.perf_counter()
        dropout = derived_seed(self.settings.seed, self.ranks.purpose("dropout"), epoch)
        with _seeded(dropout, self.device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "gradients of the prototypes were not finite")  # looked at below
            loss, accuracy = self._train_epoch(epoch)
        self.train_seconds.append(time.perf_counter() - start)
        row = {
            "epoch": epoch,
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "train_loss": loss,
            "train_accuracy": accuracy,
            **_test_columns(self._measure(test) if self._is_due(epoch) else None),
            "seconds": round(time.perf_counter() - start, 3),
        }
        self.history.append(row)
        return row

    def _is_due(self, epoch: int) -> bool:
        return epoch % self.settings.evaluate_every == 0 or epoch == self.settings.epochs

    def _measure(self, test: ImageSource) -> Metrics:
        self.measured = measure(self.classifier, test, self.settings.thresholds, amp=self.measure_amp)
        return self.measured

    def _train_epoch(self, epoch: int) -> tuple[float, float]:
        """Mean loss over the steps and training accuracy, both while the weights change."""
        settings = self.settings
        self._prepare_epoch(epoch)
        generator = torch_generator(settings.seed, self.ranks.purpose("augmentation"), epoch)
        # All ranks draw alike: one fraction mixes the whole batch.
        mixing = numpy_generator(settings.seed, "mixup", epoch)
        losses = torch.zeros(self.steps, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        mine = {"rank": self.ranks.rank, "ranks": self.ranks.count}
        for step, batch in enumerate(batches(self.source, settings.batch_size, self._order(epoch), **mine)):
            images = augment(batch.images.to(self.device), settings.augment, generator, settings.crop_pad)
            labels = batch.labels.to(self.device)
            lr = learning_rate(settings, (epoch - 1) * self.steps + step, settings.epochs * self.steps)
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["lr"] = lr
            loss, features = self._forward(images, labels, mixing)
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            for optimizer in self.optimizers:
                optimizer.step()
            losses[step] = loss.detach()
            with torch.no_grad():
                correct += (self.classifier.loss.predict(features.detach()).index[:, 0] == labels).sum()
            if (step + 1) % _CHECK_EVERY == 0 or step + 1 == self.steps:
                _check_finite(losses[: step + 1], epoch, self.steps, lr)
                self._check_moved(epoch, lr)
        return losses.double().mean().item(), self.ranks.sum(correct).item() / len(self.source)

    def _check_moved(self, epoch: int, lr: float) -> None:
        """An update inside the backward leaves out a step that would end in NaN, which would hide it."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, PrototypeSGD) and optimizer.skipped_steps:
                times = f"{optimizer.skipped_steps} of {self.steps} steps"
                raise _diverged(f"a gradient of the prototypes was not finite in {times} of epoch {epoch}", lr)

    def _prepare_epoch(self, epoch: int) -> None:
        self.classifier.train()
        if self.class_weights is not None:
            self.classifier.loss.set_class_weight(self.class_weights(epoch - 1))  # type: ignore[operator]

    def _order(self, epoch: int) -> np.ndarray:
        """Indices of the images of an epoch, in the order in which they are seen."""
        return numpy_generator(self.settings.seed, "order", epoch).permutation(len(self.source))

    def _forward(self, images: Tensor, labels: Tensor, mixing: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Loss, a scalar, and features (B, D) of images (B, channels, H, W) with labels (B,)."""
        head = self.classifier.loss
        if not self.settings.mixup:
            features = self._features(images)
            return head(features, labels), features
        mixed, other_labels, fraction = mix(images, labels, self.settings.mixup, mixing)
        features = self._features(mixed)
        if takes_soft_labels(head):  # both losses in one pass
            both = torch.stack([labels, other_labels], 1)
            weight = features.new_tensor([fraction, 1 - fraction], dtype=torch.float32)
            return head(features, both, label_weight=weight.expand(both.shape)), features
        loss = fraction * head(features, labels) + (1 - fraction) * head(features, other_labels)
        return loss, features

    def _features(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            features: Tensor = self.features(images)
        return features

    def checkpoint(self) -> Checkpoint:
        """Everything that the next epoch depends on, in one piece also where classes are spread over ranks."""
        states = self._states()
        momentum = {
            name: states[parameter]["momentum_buffer"]
            for name, parameter in self.classifier.named_parameters()
            if states.get(parameter, {}).get("momentum_buffer") is not None
        }
        return Checkpoint(
            model=gather_full(self.classifier.state_dict()),
            optimizer=gather_full(momentum | self._compensation()),
            state={"epoch": len(self.history), "history": self.history},
        )

    def _states(self) -> dict[Tensor, dict[str, Any]]:
        """What the optimizers keep about each parameter."""
        return {
            parameter: optimizer.state[parameter]
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def _compensation(self) -> dict[str, Tensor]:
        """What Kahan's rounding of the prototypes cut off, by the name that it has in a checkpoint."""
        head = self.optimizers[-1]
        kept = head.state[head.weight].get("compensation") if isinstance(head, PrototypeSGD) else None
        return {} if kept is None else {"loss.weight.compensation": kept}

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint directory; UserError where it is damaged or belongs to another model."""
        checkpoint = load_checkpoint(path)
        check_tensors(path / "model.safetensors", checkpoint.model, self.classifier.state_dict())
        parameters, compensation = dict(self.classifier.named_parameters()), self._compensation()
        # Momentum belongs to every parameter or, with momentum 0, to none.
        wanted = {**(parameters if self.settings.momentum else {}), **compensation}
        check_tensors(path / "optimizer.safetensors", checkpoint.optimizer, wanted)
        for name, tensor in self.classifier.state_dict().items():
            copy_to_shard(tensor, checkpoint.model[name])
        self.history, states = checkpoint.state["history"], self._states()
        for name, kept in checkpoint.optimizer.items():
            if name in compensation:
                copy_to_shard(compensation[name], kept)
                continue
            state = states[parameters[name]]
            if "momentum_buffer" not in state:  # of prototypes it is there, and may have another dtype than they
                state["momentum_buffer"] = torch.zeros_like(parameters[name], requires_grad=False)
            copy_to_shard(state["momentum_buffer"], kept)
        for optimizer in self.optimizers:
            if isinstance(optimizer, PrototypeSGD):  # its first step would begin a momentum
                optimizer.state[optimizer.weight]["step"].fill_(len(self.history) * self.steps)


def _deferred_weights(classifier: Classifier, config: RunConfig) -> DeferredWeights | None:
    settings = config.settings
    if settings.drw_start is None:
        return None
    if not hasattr(classifier.loss, "set_class_weight"):
        raise UserError(f"loss {settings.loss} takes no class weights; leave --drw-start out, or choose another --loss")
    weights = effective_number_weights(config.class_counts, settings.beta)
    return DeferredWeights(weights, first_epoch(settings.drw_start, settings.epochs))


def _check_finite(losses: Tensor, epoch: int, steps: int, lr: float) -> None:
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step = int(bad[0]) + 1
        raise _diverged(f"the loss is {losses[step - 1].item()} at step {step} of {steps} in epoch {epoch}", lr)


def _diverged(what: str, lr: float) -> DivergedError:
    return DivergedError(
        f"{what} (learning rate {lr:.3g})",
        "start a new --out with a lower --lr, or with a smaller --scale where it is extreme. Earlier checkpoints are "
        "untouched",
    )


def _test_columns(metrics: Metrics | None) -> dict[str, float | None]:
    """The columns about the test split; None in all of them where it was not measured."""
    names = ("balanced_accuracy", "many", "medium", "few", "calibration_error", "feature_norm_mean", "own_angle_mean")
    columns = {"test_loss": "loss", "test_accuracy": "accuracy", **{name: name for name in names}}
    return {column: None if metrics is None else getattr(metrics, name) for column, name in columns.items()}


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators (initialisation, dropout) start at ``seed`` inside, and are as before after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
