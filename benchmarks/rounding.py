"""``python -m benchmarks.rounding --data-dir DIR``: the accuracy that prototypes in bfloat16 or float8 lose.

DIR holds ``icons_features256.npz`` (frozen embeddings; only the head learns) and ``omniglot28.npz`` (images; a small
network learns too), each with x_train, y_train, x_test, y_test. Every setting is trained with three seeds and measured
once, after the last step. The rows go to ``results/rounding.csv``, where rows of other settings stay.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import RESULTS, read_rows, stamp, write_rows
from ltloss import LogitAdjustedLoss
from ltloss.optim import PrototypeSGD
from ltloss.training.data.batches import augment
from ltloss.training.data.splits import long_tailed_subset, stratified_split
from ltloss.training.model.backbones import small_cnn

# How the prototypes are kept: dtype, rounding, and dtype of the momentum.
WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16, stochastic": {"dtype": torch.bfloat16, "rounding": "stochastic"},
    "bfloat16, nearest": {"dtype": torch.bfloat16, "rounding": "nearest"},
    "float8, stochastic": {"dtype": torch.float8_e4m3fn, "rounding": "stochastic"},
    "float8, nearest": {"dtype": torch.float8_e4m3fn, "rounding": "nearest"},
    "bfloat16, stochastic, momentum too": {
        "dtype": torch.bfloat16,
        "rounding": "stochastic",
        "state_dtype": torch.bfloat16,
    },
    "bfloat16, kahan": {"dtype": torch.bfloat16, "rounding": "kahan"},
}


class Task(NamedTuple):
    """A data set and how it is trained."""

    file: str
    lr: float
    scale: float
    epochs: int
    imbalance: float
    batch: int = 128
    momentum: float = 0.9
    weight_decay: float = 0.0


# The learning rate of the icons is the best that `--tune` found, on a tenth of the training part. Learning rate, scale
# and decay of Omniglot-LT were chosen on the validation split of docs/evidence.md.
TASKS = {
    "icons (embeddings)": Task("icons_features256.npz", lr=4.0, scale=32.0, epochs=10, imbalance=1),
    "Omniglot-LT": Task("omniglot28.npz", lr=0.8, scale=8.0, epochs=20, imbalance=15, weight_decay=5e-4),
}
TUNED = (1.0, 4.0, 16.0, 64.0)


class Data(NamedTuple):
    """Images (N, H, W) uint8 or embeddings (N, D), with labels (N,)."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load(path: Path, imbalance: float, validation: bool) -> Data:
    """Read the file; with ``validation`` a tenth of its training part replaces the test part."""
    with np.load(path) as archive:
        x, y, x_test, y_test = (archive[name] for name in Data._fields)
    if validation:
        kept, held = stratified_split(y, 0.1, seed=0)
        x, y, x_test, y_test = x[kept], y[kept], x[held], y[held]
    kept = long_tailed_subset(y, imbalance, seed=0)
    x, y = x[kept], y[kept]
    return Data(
        *(torch.from_numpy(np.ascontiguousarray(part)) for part in (x, y.astype(int), x_test, y_test.astype(int)))
    )


def _network(data: Data, width: int) -> nn.Module:
    if data.x_train.dim() == 2:
        return nn.Identity()
    return nn.Sequential(small_cnn(1, width), nn.BatchNorm1d(width))


def _inputs(x: Tensor) -> Tensor:
    return x.float() if x.dim() == 2 else x[:, None].float() / 255.0


def accuracy(task: Task, data: Data, seed: int, way: dict[str, Any], lr: float) -> float:
    """Test accuracy in percent after the last epoch."""
    torch.manual_seed(seed)
    counts = torch.bincount(data.y_train)
    width = data.x_train.shape[1] if data.x_train.dim() == 2 else 128
    network = _network(data, width)
    options = dict(way)
    start = LogitAdjustedLoss.from_counts(counts, width, scale=task.scale)
    head = LogitAdjustedLoss.from_counts(counts, width, scale=task.scale, dtype=options.pop("dtype", torch.float32))
    head.load_state_dict(start.state_dict())
    common = {"lr": lr, "momentum": task.momentum, "weight_decay": task.weight_decay}
    optimizers: list[torch.optim.Optimizer] = [PrototypeSGD(head, **common, seed=seed, **options)]
    if any(True for _ in network.parameters()):
        optimizers.append(torch.optim.SGD(network.parameters(), **common))
    steps = -(-len(data.y_train) // task.batch) * task.epochs
    for number, (x, y) in enumerate(_batches(task, data, seed)):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * _factor(number, steps)
            optimizer.zero_grad()
        head(network(_inputs(x)), y).backward()
        for optimizer in optimizers:
            optimizer.step()
    network.eval()
    with torch.no_grad():
        found = [head.predict(network(_inputs(x))).index[:, 0] for x in data.x_test.split(1000)]
    return 100.0 * float((torch.cat(found) == data.y_test).double().mean())


def _batches(task: Task, data: Data, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of all epochs, each epoch in another order; images are shifted by up to two pixels."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(task.epochs):
        for part in torch.randperm(len(data.y_train), generator=generator).split(task.batch):
            x = data.x_train[part]
            yield (x if x.dim() == 2 else augment(x[:, None], "crop", generator, 2)[:, 0]), data.y_train[part]


def _factor(step: int, steps: int) -> float:
    """Factor of the learning rate: a linear rise over a twentieth of the steps, then half a cosine to 0."""
    rising = steps // 20
    return (step + 1) / rising if step < rising else 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def measure(name: str, task: Task, folder: Path, seeds: int, ways: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each of these ways of keeping the prototypes."""
    data = load(folder / task.file, task.imbalance, validation=False)
    for way in ways:
        found = [accuracy(task, data, seed, WAYS[way], task.lr) for seed in range(seeds)]
        spread = statistics.stdev(found) if seeds > 1 else 0.0
        print(f"{name:20} {way:36} {statistics.mean(found):6.2f} ± {spread:.2f}", flush=True)
        yield {
            "data": name,
            "prototypes": way,
            "seeds": seeds,
            "accuracy": f"{statistics.mean(found):.2f}",
            "spread": f"{spread:.2f}",
            "each": " ".join(f"{one:.2f}" for one in found),
            "lr": task.lr,
            "scale": task.scale,
            "epochs": task.epochs,
        }


def main() -> None:
    """Train, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=tuple(TASKS), help="one of the data sets")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="some of the ways")
    parser.add_argument(
        "--tune", action="store_true", help="try learning rates on a tenth of the training part instead"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "rounding.csv", help="CSV to write")
    arguments = parser.parse_args()
    rows: dict[tuple[str, str], dict[str, Any]] = {
        (row["data"], row["prototypes"]): row for row in read_rows(arguments.output)
    }
    for name, task in TASKS.items():
        if arguments.only in (None, name) and arguments.tune:
            data = load(arguments.data_dir / task.file, task.imbalance, validation=True)
            for lr in TUNED:
                print(
                    f"{name}: lr {lr:g}: {accuracy(task, data, 0, {}, lr):.2f} on held-out training images", flush=True
                )
        elif arguments.only in (None, name):
            for row in measure(name, task, arguments.data_dir, arguments.seeds, arguments.ways):
                rows[name, row["prototypes"]] = {**stamp(), **row}
                write_rows(list(rows.values()), arguments.output)  # after each: all of it takes hours


if __name__ == "__main__":
    main()
