"""``python -m benchmarks.evidence.scales --data-dir DIR``: which default scale should ``LogitAdjustedLoss`` have?

Each problem is trained at fixed scales, with random prototypes or prototypes at the class means of the network's
features, at two learning rates, with one seed. It is also trained with scales found from the data: learned with the
rest, learned during the first pass only, or moved to a mean probability. All are judged on samples held out of the
training split; the test samples are not read. Rows go to ``results/evidence_scales.csv`` as soon as they are done, and
are not trained again. `make pictures` shows them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.evidence.pages import markdown_table, renewed
from benchmarks.evidence.problems import (
    NETWORK_RATE,
    Data,
    accuracy,
    descend,
    fewer,
    for_validation,
    held_out,
    start_at_means,
    whitened,
)
from benchmarks.evidence.spaces import EVERY, SPACES, TRAININGS
from benchmarks.timing import RESULTS, add_row, read_rows, write_rows
from ltloss import LogitAdjustedLoss, default_scale
from ltloss.extend import logsumexp_stats, margin_losses, reduce_losses
from ltloss.losses.defaults import FROZEN_SCALE
from ltloss.training.comparison.methods import RENAMED, method

TABLE = RESULTS / "evidence_scales.csv"
LIKELY = RESULTS / "evidence_scales_likely.csv"
OMNIGLOT, FASHION = (RESULTS / f"evidence_{name}_tuning.csv" for name in ("omniglot", "fashion"))
CLASSIFIERS = RESULTS / "evidence_classifiers_tuning.csv"
FIXED = ("8", "16", "32", "64")
LEARNED = ("learned", "first pass")
MOVING = {
    "learned": "learned",
    "first pass": "learned in the first pass",
    "held at 0.5": "moved to a mean probability of 0.5",
    "held at 0.7": "of 0.7",
}
HELD = {"held at 0.5": 0.5, "held at 0.7": 0.7}  # mean probability of the right class in a batch
STARTS = ("means", "drawn")
RATES = (0.16, 0.04)  # learning rates of the prototypes, times √D
_SCALE_RATE, _FIRST_SCALE, _LEAST_SCALE = 0.03, 16.0, 4.0
_GAIN = 0.05  # step of ln s per unit of missing probability
_KEY = ("data", "scale", "start", "lr", "seed")


class Setting(NamedTuple):
    """How a problem is trained."""

    name: str
    batch: int
    passes: int
    classes: int
    load: Callable[[Path], Data]
    frozen: bool = False


def _whitened(folder: Path) -> Data:
    return whitened(for_validation("icons", folder))


def _fewer(folder: Path) -> Data:
    return fewer(for_validation("icons", folder), 16)


SETTINGS = {
    "icons": Setting("icons, frozen features", *TRAININGS["icons"], 1655, partial(for_validation, "icons"), True),
    "icons, whitened": Setting("icons, frozen features, whitened", *TRAININGS["icons"], 1655, _whitened, True),
    "icons, few": Setting("104 of the icons' classes, frozen features", 128, 10, 104, _fewer, True),
    "toponyms": Setting(
        *("toponyms, one town of seven", *TRAININGS["toponyms"], 3957), partial(for_validation, "toponyms", **EVERY)
    ),
    "fashion": Setting("Fashion-MNIST-LT", *TRAININGS["fashion"], 10, partial(for_validation, "fashion")),
    "icons40": Setting("icons, 20 x 20 pixels", *TRAININGS["icons40"], 1655, partial(for_validation, "icons40")),
}
CLASSES = {
    **{data: (setting.name, setting.classes, setting.frozen) for data, setting in SETTINGS.items()},
    "omniglot": ("Omniglot-LT", 1623, False),
}


class Trial(NamedTuple):
    """One training."""

    data: str
    scale: str  # a number, or a name in LEARNED or HELD
    start: str
    lr: float
    seed: int = 0

    def key(self) -> tuple[str, ...]:
        """The columns that identify it in the table."""
        return tuple(map(str, self))


def trials() -> Iterable[Trial]:
    """All trials, the most telling first."""
    for start in STARTS:
        for lr in RATES:
            for data in SETTINGS:
                found = (*HELD, *LEARNED, *FIXED) if start == "means" else FIXED
                yield from (Trial(data, scale, start, lr) for scale in found)


class _Moving(LogitAdjustedLoss):
    """A loss whose scale is exp of a parameter; with ``held`` each step moves the mean probability towards that."""

    held: float | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_FIRST_SCALE)))

    def forward(self, features: Tensor, labels: Tensor, **_: Any) -> Tensor:
        scale = self.log_scale.exp()
        stats = logsumexp_stats(features, self.weight, labels, scale=scale, log_prior=self.log_prior)
        losses = margin_losses(stats)
        if self.held is not None:
            with torch.no_grad():
                self.log_scale += _GAIN * (self.held - losses.neg().exp().mean())
                self.log_scale.clamp_(min=math.log(_LEAST_SCALE))
        return reduce_losses(losses, stats.labels)


@cache
def _data(name: str, folder: Path) -> Data:
    return SETTINGS[name].load(folder)


def _optimizers(trial: Trial, head: Any, network: nn.Module, width: int) -> list[torch.optim.Optimizer]:
    """Optimizers of the prototypes, and of network and scale if they learn."""
    learned, network_learns = trial.scale in LEARNED, list(network.parameters())
    made = [torch.optim.AdamW([head.weight], lr=trial.lr / width**0.5, fused=True)]
    made += [torch.optim.AdamW(network_learns, lr=NETWORK_RATE, fused=True)] if network_learns else []
    return made + ([torch.optim.Adam([head.log_scale], lr=_SCALE_RATE)] if learned else [])


def train(trial: Trial, folder: Path) -> dict[str, Any]:
    """Train, and return the row of the table."""
    torch.set_num_threads(1)
    torch.manual_seed(trial.seed)
    data, setting = _data(trial.data, folder), SETTINGS[trial.data]
    counts, network = torch.bincount(data.labels), data.network()
    width = network(data.train[:2]).shape[1]
    moving = trial.scale in (*LEARNED, *HELD)
    head: Any = _Moving if moving else LogitAdjustedLoss
    head = head.from_counts(counts, width, scale=None if moving else float(trial.scale))
    if trial.scale in HELD:
        head.held = HELD[trial.scale]
    if trial.start == "means":
        start_at_means(head, network, data.train, data.labels)
    each = len(data.labels) // setting.batch
    optimizers = _optimizers(trial, head, network, width)
    steps = setting.passes * each
    start, after_first = time.perf_counter(), math.nan

    def before(step: int) -> None:
        nonlocal after_first
        if step == each and moving:
            after_first = float(head.log_scale.detach().exp())
            head.log_scale.requires_grad_(trial.scale != "first pass")

    given = {"batch": setting.batch, "steps": steps, "seed": trial.seed}
    descend(network, head, data, optimizers, **given, before=before)
    return {
        **dict(zip(_KEY, trial.key(), strict=True)),
        **accuracy(network, head, data.test, data.test_labels, counts, data.groups),
        "after_first_pass": f"{after_first:.2f}" if moving else "",
        "at_the_end": f"{float(head.log_scale.detach().exp()):.2f}" if moving else "",
        "seconds": f"{time.perf_counter() - start:.1f}",
        "torch": torch.__version__,
    }


def compared(tuning: Path = OMNIGLOT) -> list[dict[str, str]]:
    """The trials of Omniglot-LT that ``ltloss compare --tune`` trained (docs/evidence.md), as rows of this table."""
    rows = []
    for row in read_rows(tuning):
        values = json.loads(row["values"])
        if row["method"] == "logit-adjusted" and values["tau"] == 1.0:
            shown = {"data": "omniglot", "scale": f"{values['scale']:g}", "start": "drawn", "lr": f"{values['lr']:g}"}
            rows.append({**shown, "accuracy": row["balanced_accuracy"], "at_the_end": ""})
    return rows


def best(rows: Sequence[Mapping[str, str]], data: str, **fixed: str) -> float | None:
    """The highest accuracy of a problem's rows with these values; None without such a row."""
    same = [row for row in rows if row["data"] == data and all(row[name] == text for name, text in fixed.items())]
    return max((float(row["accuracy"]) for row in same), default=None)


def at_scale(rows: Sequence[Mapping[str, str]], data: str, scale: float) -> float | None:
    """Accuracy at a scale with the best start and learning rate, interpolated over ln s between trained scales.

    None where no scale as large was trained.
    """
    found: list[float] = []
    for start, lr in {(row["start"], row["lr"]) for row in rows if row["data"] == data}:
        shares = [best(rows, data, start=start, lr=lr, scale=fixed) for fixed in FIXED]
        known = [(math.log(float(s)), share) for s, share in zip(FIXED, shares, strict=True) if share is not None]
        # Below the smallest trained scale the smallest counts; above the largest nothing is known.
        if len(known) > 1 and math.log(scale) <= known[-1][0] + 1e-9:
            found.append(float(np.interp(math.log(scale), *zip(*known, strict=True))))
    return max(found, default=None)


RULES: Mapping[str, Callable[[int, bool], float]] = {  # functions of C, and of whether the features are frozen
    **{f"{scale}": lambda _, __, scale=scale: float(scale) for scale in (8, 12, 16, 24, 32, 64)},
    "ln C, at least 8": lambda c, _: max(8.0, math.log(c)),
    "1.5·ln C, at least 8": lambda c, _: max(8.0, 1.5 * math.log(c)),
    "2·ln C, at least 8": lambda c, _: default_scale(c),
    "1.5·ln C, at least 8; 32 for frozen features": lambda c, frozen: 32.0 if frozen else max(8.0, 1.5 * math.log(c)),
    "2·ln C, at least 8; 32 for frozen features": lambda c, frozen: 32.0 if frozen else default_scale(c),
}


def regrets(rows: Sequence[Mapping[str, str]], likely: Sequence[Mapping[str, str]] = ()) -> list[list[str]]:
    """A header, and for each rule the points that it loses on each problem to the best training there."""
    tops = {data: top for data in CLASSES if (top := best(rows, data)) is not None}

    def line(name: str, found: Sequence[float | None]) -> list[str]:
        lost = [None if x is None else 100 * (top - x) for top, x in zip(tops.values(), found, strict=True)]
        known = [x for x in lost if x is not None]
        cells = ["–" if x is None else f"{x:.1f}" for x in lost]
        return [name, *cells, f"{max(known):.1f}" if len(known) == len(lost) else "–"]

    lines = [["scale", *(CLASSES[data][0] for data in tops), "worst"]]
    for name, rule in RULES.items():
        lines.append(line(name, [at_scale(rows, data, rule(*CLASSES[data][1:])) for data in tops]))
    scales = {row["data"]: float(row["scale"]) for row in likely}
    found = [at_scale(rows, data, scales[data]) if data in scales else None for data in tops]
    lines.append(line("most likely before training", found))
    default = [at_scale(rows, data, default_scale(CLASSES[data][1])) for data in tops]
    learned = [best(rows, data, scale="learned") for data in tops]
    both = [ours if CLASSES[data][2] else usual for data, ours, usual in zip(tops, learned, default, strict=True)]
    lines.append(line("2·ln C, at least 8; learned for frozen features", both))
    for name, title in MOVING.items():
        lines.append(line(title, [best(rows, data, scale=name) for data in tops]))
    return lines


def accuracies(rows: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """A header, and a line for each problem, start and learning rate at which several scales were trained."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    columns = [scale for scale in (*FIXED, *MOVING) if any(row["scale"] == scale for row in rows)]
    for row in rows:
        end = f" ({float(row['at_the_end']):.0f})" if row["at_the_end"] else ""
        found.setdefault((row["data"], row["start"], row["lr"]), {})[row["scale"]] = (
            f"{100 * float(row['accuracy']):.1f}{end}"
        )
    titles = [MOVING.get(scale, f"s = {scale}") for scale in columns]
    lines = [["problem", "start", "lr", *titles]]
    for (data, start, lr), cells in found.items():
        if len(cells) < 2:
            continue
        lines.append([CLASSES[data][0], start, lr, *(cells.get(scale, "–") for scale in columns)])
    return lines


class Tuned(NamedTuple):
    """A problem with its default scale, and its trials: loss, values as JSON, and accuracy."""

    problem: str
    default: float
    trials: Sequence[tuple[str, str, str]]


def tuned() -> list[Tuned]:
    """The trials of ``ltloss compare --tune``, and of ``benchmarks.evidence.classifiers``."""
    found = [
        Tuned(
            f"{CLASSES[data][0]}, {CLASSES[data][1]:,} classes",
            default_scale(CLASSES[data][1]),
            [(row["method"], row["values"], row["balanced_accuracy"]) for row in read_rows(path)],
        )
        for data, path in (("omniglot", OMNIGLOT), ("fashion", FASHION))
    ]
    rows = read_rows(CLASSIFIERS)
    for space in ("20 x 20 pixels", "toponyms", "whitened"):
        classes = CLASSES[SPACES[space].problem][1]
        default = default_scale(classes) if SPACES[space].learns else FROZEN_SCALE
        trials = [(row["method"], row["values"], row["accuracy"]) for row in rows if row["space"] == space]
        found.append(Tuned(f"{SPACES[space].title}, {classes:,} classes", default, trials))
    return found


def of_modules(problems: Sequence[Tuned]) -> list[list[str]]:
    """A header, and for every cosine loss tuned on a problem the points that its default scale loses to its best scale.

    The accuracy at the default scale is interpolated over ln s between the best trials of two scales.
    """
    lines = [["problem", "loss", "best scale", "best", "default scale", "there", "loses"]]
    for problem, default, trials in problems:
        shares: dict[str, dict[float, float]] = {}
        for name, values, share in trials:
            scale = json.loads(values).get("scale")
            if scale is not None and share:
                known = shares.setdefault(RENAMED.get(name, name), {})
                known[scale] = max(float(share), known.get(scale, 0.0))
        for name, known in shares.items():
            top = max(known, key=known.__getitem__)
            scales = sorted(known)
            there = float(np.interp(math.log(default), np.log(scales), [known[scale] for scale in scales]))
            highest, found, lost = (f"{100 * share:.1f}" for share in (known[top], there, known[top] - there))
            lines.append([problem, method(name).title, f"{top:g}", highest, f"{default:.1f}", found, lost])
    return lines


def rendered(page: str, rows: Sequence[Mapping[str, str]]) -> str:
    """The page with its tables."""
    rows = [*rows, *compared()]
    page = renewed(page, "modules", markdown_table(of_modules(tuned())))
    page = renewed(page, "scales", markdown_table(accuracies(rows)))
    return renewed(page, "regrets", markdown_table(regrets(rows, read_rows(LIKELY))))


@torch.no_grad()
def likely_scale(data: Data, most: int = 4000) -> float:
    """The scale at which cosines to the class means, before training, give held-out samples the largest likelihood."""
    torch.manual_seed(0)
    network, labels = data.network(), data.labels.numpy()
    kept, out = held_out(labels, "scale")
    out = np.random.default_rng(0).permutation(out)[:most]
    head = LogitAdjustedLoss.from_counts(torch.bincount(data.labels[kept]), network(data.train[:2]).shape[1], scale=1.0)
    start_at_means(head, network, data.train[kept], data.labels[kept])
    cosines = torch.cat([head.logits(network(data.train[part])) for part in torch.from_numpy(out).split(512)])
    tried = [2.0 ** (quarter / 4) for quarter in range(33)]
    losses = [float(nn.functional.cross_entropy(s * cosines + head.log_prior, data.labels[out])) for s in tried]
    return tried[int(np.argmin(losses))]


def main() -> None:
    """Train what the table lacks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="where the .npz files lie")
    parser.add_argument("--data", action="append", choices=tuple(SETTINGS), help="which (default: all)")
    parser.add_argument("--scale", action="append", choices=(*FIXED, *LEARNED, *HELD), help="which (default: all)")
    parser.add_argument("--most", type=int, help="no more trainings than that")
    parser.add_argument("--likely", action="store_true", help="only find the scales that are most likely at the start")
    options = parser.parse_args()
    if options.likely:
        torch.set_num_threads(1)
        found = {data: likely_scale(_data(data, options.data_dir)) for data in SETTINGS}
        write_rows([{"data": data, "scale": f"{scale:.1f}"} for data, scale in found.items()], LIKELY)
        return
    rows = list(read_rows(TABLE))
    done = {tuple(row[name] for name in _KEY) for row in rows}
    data, scales = options.data or SETTINGS, options.scale or (*FIXED, *LEARNED, *HELD)
    wanted = [t for t in trials() if t.data in data and t.scale in scales and t.key() not in done]
    for trial in wanted[: options.most]:
        add_row(train(trial, options.data_dir), rows, TABLE)


if __name__ == "__main__":
    main()
