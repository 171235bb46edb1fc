"""The training loop: SGD with momentum and a cosine schedule, one checkpoint an epoch, resumable at any moment."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import augment, batch_count, batches
from .checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, remove_leftovers, save_checkpoint, write_file
from .classifier import Classifier, check_tensors, choose_device
from .config import RunConfig, Settings
from .datasets import ImageSource
from .errors import UserError
from .evaluation import Evaluation, measure
from .metrics import Metrics
from .progress import progress_bar
from .ranks import Ranks, joined, put, spread, whole
from .run_folder import check_same_data, open_run, write_config, write_metrics
from .seeds import derived_seed, numpy_generator, torch_generator
from .training_data import prepare_data

_CHECK_EVERY = 20  # steps between looks at the losses: each look makes a GPU wait


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run leaves in memory; `history` holds the rows of metrics.csv."""

    run: Path
    evaluation: Evaluation  # of the test split, after the last epoch
    history: list[dict[str, Any]]
    ranks: Ranks


def train(out: Path, given: Mapping[str, Any], *, resume: bool = False, quiet: bool = False) -> TrainingResult:
    """Train as the settings `given` say, and write the run folder `out`.

    A run that was killed at any moment and continued with `resume` takes the same steps as one that was not.

    Raises UserError before anything is written where the settings, the data or `out` cannot be used, and later where
    the loss becomes NaN or infinite.
    """
    settings, stored = open_run(out, given, resume)
    with joined(settings.parallel, choose_device(settings.device)) as (ranks, device):
        data = prepare_data(settings)
        if stored is not None:
            check_same_data(stored, data.config, out)
        checkpoint = latest_checkpoint(out)
        trainer = Trainer(data.config, data.train, device, ranks)
        if checkpoint is not None:
            trainer.restore(checkpoint)
        if ranks.first:
            out.mkdir(parents=True, exist_ok=True)
            remove_leftovers(out)
            write_config(out, data.config)
            if trainer.history:
                write_metrics(out, trainer.history)
        _run_epochs(trainer, data.test, out, quiet or not ranks.first)
        metrics = measure(trainer.classifier, data.test, settings.thresholds)
        evaluation = Evaluation(out, settings.data, "test", data.config, settings.thresholds, metrics)
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
            progress.set_postfix(loss=f"{row['train_loss']:.3f}", test=f"{row['test_accuracy']:.3f}")
            progress.update()


class Trainer:
    """The state that training changes: the classifier, the optimizer and the history of the epochs so far."""

    def __init__(
        self, config: RunConfig, source: ImageSource, device: torch.device, ranks: Ranks | None = None
    ) -> None:
        self.settings = config.settings
        self.source = source
        self.device = device
        self.ranks = ranks or Ranks()
        if len(source) < 2 * self.ranks.count:
            raise UserError(
                f"{len(source)} training pictures are too few for {self.ranks.count} processes; start fewer"
            )
        self.steps = batch_count(len(source), self.settings.batch_size, self.ranks.count)
        self.amp = device.type == "cuda" if self.settings.amp is None else self.settings.amp
        with _seeded(derived_seed(self.settings.seed, "initial weights"), device):
            self.classifier = Classifier(config).to(device)
        self.features = spread(self.classifier, self.ranks)
        self.optimizer = build_optimizer(self.classifier, self.settings)
        self.history: list[dict[str, Any]] = []

    def run_epoch(self, epoch: int, test: ImageSource) -> dict[str, Any]:
        """Train epoch number `epoch` (from 1), measure the test split, and return the new row of the history."""
        start = time.perf_counter()
        with _seeded(derived_seed(self.settings.seed, self.ranks.purpose("dropout"), epoch), self.device):
            loss, accuracy = self._train_epoch(epoch)
        metrics = measure(self.classifier, test, self.settings.thresholds)
        row = {
            "epoch": epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "train_accuracy": accuracy,
            **_test_columns(metrics),
            "seconds": round(time.perf_counter() - start, 3),
        }
        self.history.append(row)
        return row

    def _train_epoch(self, epoch: int) -> tuple[float, float]:
        """Mean loss over the steps and training accuracy, both while the weights change."""
        settings, head = self.settings, self.classifier.loss
        self.classifier.train()
        order = numpy_generator(settings.seed, "order", epoch).permutation(len(self.source))
        generator = torch_generator(settings.seed, self.ranks.purpose("augmentation"), epoch)
        losses = torch.zeros(self.steps, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        mine = {"rank": self.ranks.rank, "ranks": self.ranks.count}
        for step, batch in enumerate(batches(self.source, settings.batch_size, order, **mine)):
            images = augment(batch.images.to(self.device), settings.augment, generator)
            labels = batch.labels.to(self.device)
            rate = learning_rate(settings, (epoch - 1) * self.steps + step, settings.epochs * self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                features = self.features(images)
            loss = head(features, labels)
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            self.optimizer.step()
            losses[step] = loss.detach()
            with torch.no_grad():
                correct += (head.predict(features.detach()).index[:, 0] == labels).sum()
            if (step + 1) % _CHECK_EVERY == 0 or step + 1 == self.steps:
                _check_finite(losses[: step + 1], epoch, self.steps, rate)
        return losses.double().mean().item(), self.ranks.sum(correct).item() / len(self.source)

    def checkpoint(self) -> Checkpoint:
        """Everything that the next epoch depends on, in one piece also where classes are spread over ranks."""
        return Checkpoint(
            model=whole(self.classifier.state_dict()),
            optimizer=whole(
                {
                    name: self.optimizer.state[parameter]["momentum_buffer"]
                    for name, parameter in self.classifier.named_parameters()
                    if self.optimizer.state[parameter].get("momentum_buffer") is not None
                }
            ),
            state={"epoch": len(self.history), "history": self.history},
        )

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint directory; UserError where it is damaged or belongs to another model."""
        checkpoint = load_checkpoint(path)
        check_tensors(path / "model.safetensors", checkpoint.model, self.classifier.state_dict())
        parameters = dict(self.classifier.named_parameters())
        # Momentum belongs to every parameter or, with momentum 0, to none.
        check_tensors(
            path / "optimizer.safetensors", checkpoint.optimizer, parameters if self.settings.momentum else {}
        )
        for name, tensor in self.classifier.state_dict().items():
            put(tensor, checkpoint.model[name])
        for name, momentum in checkpoint.optimizer.items():
            buffer = torch.zeros_like(parameters[name], requires_grad=False)
            put(buffer, momentum)
            self.optimizer.state[parameters[name]]["momentum_buffer"] = buffer
        self.history = checkpoint.state["history"]


def build_optimizer(classifier: nn.Module, settings: Settings) -> torch.optim.SGD:
    """SGD over backbone and prototypes; biases and the factors of normalisation layers do not decay."""
    parameters = list(classifier.parameters())
    sharded = [p for p in parameters if hasattr(p, "device_mesh")]  # which torch does not update beside others
    groups = [
        {
            "params": [p for p in parameters if p.ndim > 1 and p not in set(sharded)],
            "weight_decay": settings.weight_decay,
        },
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        {"params": sharded, "weight_decay": settings.weight_decay},
    ]
    return torch.optim.SGD([group for group in groups if group["params"]], lr=settings.lr, momentum=settings.momentum)


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """The rate of step number `step` (from 0) of `total`: a linear rise to settings.lr, then half a cosine to 0."""
    rising = math.floor(settings.warmup * total)
    if step < rising:
        return settings.lr * (step + 1) / rising
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))


def _check_finite(losses: Tensor, epoch: int, steps: int, rate: float) -> None:
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step = int(bad[0]) + 1
        raise UserError(
            f"the loss is {losses[step - 1].item()} at step {step} of {steps} in epoch {epoch} "
            f"(learning rate {rate:.3g}); start a new --out with a lower --lr, or with a smaller --scale where it is "
            "extreme. Earlier checkpoints are untouched"
        )


def _test_columns(metrics: Metrics) -> dict[str, float | None]:
    same = {name: getattr(metrics, name) for name in ("many", "medium", "few", "feature_norm_mean", "own_angle_mean")}
    return {"test_loss": metrics.loss, "test_accuracy": metrics.accuracy, **same}


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators (initialisation, dropout) start at `seed` inside, and are as before after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
