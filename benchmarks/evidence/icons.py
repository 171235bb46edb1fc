"""``python -m benchmarks.evidence.icons --data-dir DIR``: classifiers of icons, method beside method.

1,655 things, 68,617 icons as embeddings (icons_features256.npz in DIR), three test icons of each thing from icon sets
that gave no training icon of it. Every method is tuned by the same climb on training icons that are held out, two
passes a trial, and trained for four passes with three seeds. All have the same features, centred and whitened as
``LongTailClassifier`` does it, and prototypes that start at the class means; some also the features as they are. The
estimator and scikit-learn's LogisticRegression come from ``benchmarks/estimator.py``. ``--space "20 x 20 pixels"``: the
same icons as images (icons40.npz), and a network that learns with the head, two passes also at the end. Rows go to
``results/evidence_icons.csv`` and ``..._tuning.csv`` as they are done; what is there is not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.evidence.pages import markdown_table, renewed
from benchmarks.evidence.problems import (
    DATA,
    NETWORK_RATE,
    Data,
    accuracy,
    descend,
    for_validation,
    start_at_means,
    whitened,
)
from benchmarks.timing import RESULTS, read_rows, write_rows
from ltloss import CosineSoftmaxLoss, LDAMLoss, LinearSoftmaxLoss, LogitAdjustedLoss, LongTailLoss
from ltloss.class_balance import log_prior_from_counts
from ltloss.losses.defaults import LONG_TAIL_PRIOR
from ltloss.training.comparison.climb import next_points
from ltloss.training.comparison.tables import percents

TABLE = RESULTS / "evidence_icons.csv"
TUNING = RESULTS / "evidence_icons_tuning.csv"
ESTIMATOR = RESULTS / "estimator.csv"
PAGE = Path(__file__).parents[2] / "docs" / "evidence-embeddings.md"
_SEEDS = (0, 1, 2)
_TRIAL_PASSES = 2
_GAIN, _SURE = 16.0, 32.0  # features of a linear layer are multiplied by it; how sharp its start is
_GROUPS = ("accuracy", "many", "medium", "few")
_LRS = (0.06, 0.12, 0.24, 0.48, 0.96)  # of AdamW, divided by √D
_COSINE: Mapping[str, Sequence[float]] = {"lr": _LRS, "scale": (16.0, 32.0, 64.0)}
_LINEAR: Mapping[str, Sequence[float]] = {"lr": _LRS, "weight_decay": (0.01, 0.1, 1.0)}


class Space(NamedTuple):
    """What a classifier gets, and how it is trained; ``fewer``: shorter lists of values, where a training is long."""

    batch: int
    passes: int
    fewer: Mapping[str, Sequence[float]] = MappingProxyType({})


IMAGES = "20 x 20 pixels"
SPACES = {
    "whitened": Space(512, 4),
    "as they are": Space(512, 4),
    IMAGES: Space(256, 2, {"lr": (0.08, 0.16, 0.32), "scale": (16.0, 32.0), "weight_decay": (0.01, 0.1)}),
}


class Method(NamedTuple):
    """What is tuned, and the loss for counts (C,), D and the tuned values but for those of the optimizer."""

    title: str
    space: Mapping[str, Sequence[float]]
    build: Callable[..., Any]
    linear: bool = False


def _linear(prior: bool, counts: Tensor, width: int) -> LinearSoftmaxLoss:
    return LinearSoftmaxLoss(len(counts), width, log_prior=log_prior_from_counts(counts) if prior else None)


def _cosine(counts: Tensor, width: int, scale: float) -> CosineSoftmaxLoss:
    return CosineSoftmaxLoss(len(counts), width, scale=scale)


def _ldam(counts: Tensor, width: int, scale: float, margin: float) -> LDAMLoss:
    return LDAMLoss.from_counts(counts, width, scale=scale, max_margin=margin)


def _long_tail(counts: Tensor, width: int, scale: float, margin: float) -> LongTailLoss:
    return LongTailLoss.from_counts(counts, width, scale=scale, margin=margin, **LONG_TAIL_PRIOR)


METHODS = {
    "logit-adjusted": Method("cosine with log prior (`LogitAdjustedLoss`)", _COSINE, LogitAdjustedLoss.from_counts),
    "linear": Method("linear cross-entropy", _LINEAR, partial(_linear, False), linear=True),
    "linear-prior": Method("linear with log prior", _LINEAR, partial(_linear, True), linear=True),
    "long-tail-prior": Method(
        "long-tail margins with log prior (`LongTailLoss`)", {**_COSINE, "margin": (0.1, 0.3, 0.5)}, _long_tail
    ),
    "cosine": Method("cosine", _COSINE, _cosine),
    "ldam": Method("LDAM", {**_COSINE, "margin": (0.1, 0.3, 0.5)}, _ldam),
}
MEANS = "nearest class mean, by cosine"
POST_HOC = "linear, log prior taken off afterwards"
TAUS = (0.5, 1.0, 1.5)


class _Multiplied(nn.Module):
    """Features times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, features: Tensor) -> Tensor:
        return self.factor * features


@cache
def _data(folder: Path, space: str, split: str) -> Data:
    """Images; or features whitened, or as they are but for one factor that makes their mean length 1."""
    name = "icons40" if space == IMAGES else "icons"
    data = for_validation(name, folder) if split == "validation" else DATA[name](folder)
    if space == IMAGES:
        return data
    if space == "whitened":
        return whitened(data)
    length = data.train.norm(dim=1).mean()
    return data._replace(train=data.train / length, test=data.test / length)


def class_means(data: Data) -> Tensor:
    """(C, D)."""
    counts = torch.bincount(data.labels)
    return torch.zeros(len(counts), data.train.shape[1]).index_add_(0, data.labels, data.train) / counts[:, None]


@torch.no_grad()
def _start(head: Any, method: Method, data: Data) -> None:
    """By the nearest class mean: in distance (linear discriminant analysis), or in angle."""
    means = class_means(data)
    if method.linear:
        head.weight.copy_(_SURE / _GAIN * means)
        head.bias.copy_(-0.5 * _SURE * means.square().sum(1))
    else:
        head.weight.copy_(nn.functional.normalize(means))


def trained(
    method: Method, values: Mapping[str, float], data: Data, batch: int, passes: int, seed: int
) -> tuple[nn.Module, Any]:
    """Network and head after AdamW with rates that fall along a cosine."""
    torch.manual_seed(seed)
    network = data.network()
    learns = list(network.parameters())
    counts, width = torch.bincount(data.labels), network(data.train[:2]).shape[1]
    options = {name: value for name, value in values.items() if name not in ("lr", "weight_decay")}
    head = method.build(counts, width, **options)
    if not learns:
        network = _Multiplied(_GAIN if method.linear else 1.0)
        _start(head, method, data)
    elif not method.linear:
        start_at_means(head, network, data.train, data.labels)
    steps = passes * (len(data.labels) // batch)
    given = {"lr": values["lr"] / width**0.5, "weight_decay": values.get("weight_decay", 0.01)}
    optimizers = [torch.optim.AdamW(head.parameters(), **given, fused=True)]
    optimizers += [torch.optim.AdamW(learns, lr=NETWORK_RATE, fused=True)] if learns else []
    descend(network, head, data, optimizers, batch=batch, steps=steps, seed=seed)
    return network, head


def judged(network: nn.Module, head: Any, data: Data) -> dict[str, float]:
    """Accuracy on the test part of the data."""
    return accuracy(network, head, data.test, data.test_labels, torch.bincount(data.labels), data.groups)


@torch.no_grad()
def adjusted(network: nn.Module, head: Any, data: Data, tau: float) -> dict[str, float]:
    """Accuracy with τ·log π taken off the logits of a linear head."""
    before = head.bias.clone()
    head.bias -= tau * log_prior_from_counts(torch.bincount(data.labels))
    found = judged(network, head, data)
    head.bias.copy_(before)
    return found


def of_means(data: Data) -> dict[str, float]:
    """Accuracy of the class means alone."""
    head = CosineSoftmaxLoss(int(data.labels.max()) + 1, data.train.shape[1])
    with torch.no_grad():
        head.weight.copy_(class_means(data))
    return judged(nn.Identity(), head, data)


def chosen(rows: Sequence[Mapping[str, str]], space: str, method: str) -> dict[str, Any]:
    """The values of the trial that was best on the validation icons."""
    tried = [row for row in rows if (row["space"], row["method"]) == (space, method)]
    found: dict[str, Any] = json.loads(max(tried, key=lambda row: float(row["accuracy"]))["values"])
    return found


class Study:
    """Trains what the tables lack, a space and a method at a time."""

    def __init__(self, folder: Path, rows: list[dict[str, str]], tried: list[dict[str, str]]) -> None:
        self.folder, self.rows, self.tried = folder, rows, tried

    def _add(self, rows: list[dict[str, str]], path: Path, space: str, method: str, **facts: Any) -> None:
        row = {"space": space, "method": method, **facts, "torch": torch.__version__}
        rows.append({name: json.dumps(v) if isinstance(v, dict) else str(v) for name, v in row.items()})
        write_rows(rows, path)
        print(*rows[-1].values(), flush=True)

    def tune(self, space: str, name: str) -> None:
        """The climb; of a linear layer each trial also tries what taking the prior off afterwards brings."""
        method, data, (batch, _, fewer) = METHODS[name], _data(self.folder, space, "validation"), SPACES[space]
        axes = {axis: fewer.get(axis, values) for axis, values in method.space.items()}
        while points := next_points(axes, self._known(space, name)):
            for values in points:
                start = time.perf_counter()
                network, head = trained(method, values, data, batch, _TRIAL_PASSES, 0)
                facts = {**judged(network, head, data), "seconds": f"{time.perf_counter() - start:.1f}"}
                if name == "linear":
                    for tau in TAUS:
                        found = adjusted(network, head, data, tau)
                        self._add(self.tried, TUNING, space, "post-hoc", values={**values, "tau": tau}, **found)
                self._add(self.tried, TUNING, space, name, values=values, **facts)

    def _known(self, space: str, name: str) -> list[tuple[dict[str, Any], float]]:
        return [
            (json.loads(row["values"]), float(row["accuracy"]))
            for row in self.tried
            if (row["space"], row["method"]) == (space, name)
        ]

    def measure(self, space: str, name: str) -> None:
        """Three seeds with the chosen values; what was trained with others is forgotten."""
        data = _data(self.folder, space, "test")
        names = (name, "post-hoc") if name == "linear" else (name,)
        wanted = {each: chosen(self.tried, space, each) for each in names}
        shown = {each: json.dumps(values) for each, values in wanted.items()}
        stale = [r for r in self.rows if r["space"] == space and r["values"] != shown.get(r["method"], r["values"])]
        self.rows[:] = [row for row in self.rows if row not in stale]
        done = {(row["method"], row["seed"]) for row in self.rows if row["space"] == space}
        for seed in _SEEDS:
            known: dict[str, Any] = {}  # the same training, with and without the prior taken off
            for each, values in wanted.items():
                if (each, str(seed)) in done:
                    continue
                start, tau = time.perf_counter(), values.get("tau")
                given = {key: value for key, value in values.items() if key != "tau"}
                key = json.dumps(given)
                if key not in known:
                    known[key] = trained(METHODS[name], given, data, *SPACES[space][:2], seed)
                network, head = known[key]
                found = judged(network, head, data) if tau is None else adjusted(network, head, data, tau)
                seconds = f"{time.perf_counter() - start:.1f}"
                self._add(self.rows, TABLE, space, each, values=values, seed=seed, **found, seconds=seconds)

    def means(self, space: str) -> None:
        """The class means, which need no training."""
        if not any((row["space"], row["method"]) == (space, "means") for row in self.rows):
            found = of_means(_data(self.folder, space, "test"))
            self._add(self.rows, TABLE, space, "means", values={}, seed=0, **found)


def _estimators(rows: Sequence[Mapping[str, str]]) -> Iterator[list[str]]:
    """Lines of what benchmarks/estimator.py measured; it has no group of medium classes."""
    for provider, title in (
        ("ltloss LongTailClassifier", '`LongTailClassifier()`, "auto"'),
        ("sklearn LogisticRegression", "scikit-learn's `LogisticRegression(max_iter=100)`"),
    ):
        same = [r for r in rows if (r["provider"], r["threads"]) == (provider, "1") and "icons_features" in r["data"]]
        if same:
            cells = [percents([float(row[key]) / 100 for row in same]) for key in ("all", "many", "few")]
            yield [title, "its own", same[0]["chosen"], *cells[:2], "–", cells[2]]


def rendered(page: str, rows: Sequence[Mapping[str, str]], others: Sequence[Mapping[str, str]]) -> str:
    """The page with a table for features that do not learn, and one for images."""
    images = [row for row in rows if row["space"] == IMAGES]
    page = renewed(page, "icons", table([row for row in rows if row not in images], others))
    return renewed(page, "icons as images", table(images))


def table(rows: Sequence[Mapping[str, str]], others: Sequence[Mapping[str, str]] = ()) -> str:
    """A line for each method and space, the best first."""
    titles = {"means": MEANS, "post-hoc": POST_HOC, **{name: method.title for name, method in METHODS.items()}}
    found: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in rows:
        found.setdefault((row["method"], row["space"]), []).append(row)
    lines = list(_estimators(others))
    for (name, space), same in found.items():
        values = ", ".join(f"{key}={value:g}" for key, value in json.loads(same[0]["values"]).items())
        cells = [percents([float(row[key]) for row in same]) for key in _GROUPS]
        lines.append([titles[name], space, values, *cells])
    lines.sort(key=lambda line: -float(line[3].split()[0]))
    return markdown_table([["method", "features", "values", "all", "many (>100)", "medium", "few (<20)"], *lines])


def main() -> None:
    """Train what the tables lack, and renew the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="where the data files lie")
    parser.add_argument("--method", action="append", choices=tuple(METHODS), help="which (default: all)")
    parser.add_argument("--space", choices=tuple(SPACES), default="whitened")
    parser.add_argument("--render", action="store_true", help="only renew the page from the CSV files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, tried = list(read_rows(TABLE)), list(read_rows(TUNING))
    if not options.render:
        study = Study(options.data_dir, rows, tried)
        if options.space != IMAGES:
            study.means(options.space)
        for name in options.method or METHODS:
            study.tune(options.space, name)
            study.measure(options.space, name)
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), rows, read_rows(ESTIMATOR)), encoding="utf-8")


if __name__ == "__main__":
    main()
