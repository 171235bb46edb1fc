"""``python -m benchmarks.evidence.classifiers --data-dir DIR``: classifiers over frozen features, method beside method.

The default problem has 1,655 classes (things) and 68,617 icons as embeddings (icons_features256.npz in DIR). The three
test icons of a class come from icon sets without training icon of it. Every method is tuned by the same climb on
held-out training icons, with two passes per trial, and trained for four passes with three seeds. The results of the
estimator and of scikit-learn's LogisticRegression come from ``benchmarks/estimator.py``.

``--space`` takes another space of ``spaces.py``: the same icons as images, with a network that learns with the head; or
features of a network that was trained on a problem and frozen, where the estimator is trained here too. ``--tune`` only
tunes, ``--others`` tunes more losses. Rows go to ``results/evidence_classifiers.csv`` and ``..._tuning.csv`` as soon as
they are done, and are not trained again. `make pictures` shows them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.linear_model import LogisticRegression

from benchmarks.evidence.heads import ALL, METHODS, adjusted, judged, of_means, trained
from benchmarks.evidence.pages import markdown_table, renewed
from benchmarks.evidence.problems import shares
from benchmarks.evidence.spaces import IMAGES, NETWORKS, SPACES, data, features
from benchmarks.timing import RESULTS, add_row, read_rows
from ltloss.sklearn import LongTailClassifier
from ltloss.training.comparison.climb import next_points
from ltloss.training.comparison.tables import percents

TABLE = RESULTS / "evidence_classifiers.csv"
TUNING = RESULTS / "evidence_classifiers_tuning.csv"
ESTIMATOR = RESULTS / "estimator.csv"
_SEEDS = (0, 1, 2)
_GROUPS = ("accuracy", "many", "medium", "few")
MEANS = "nearest class mean, by cosine"
POST_HOC = "linear, log prior taken off afterwards"
AUTO = '`LongTailClassifier()`, "auto"'
SKLEARN = "scikit-learn's `LogisticRegression(max_iter=100)`"


class Estimator(NamedTuple):
    """A classifier of scikit-learn's kind: how a seed makes it, and what it says of itself after ``fit``."""

    title: str
    make: Callable[[int], Any]
    values: Callable[[Any], dict[str, Any]] = lambda fitted: {"loss": fitted.loss_}
    seeds: tuple[int, ...] = _SEEDS


ESTIMATORS = {
    "auto": Estimator(AUTO, lambda seed: LongTailClassifier(random_state=seed)),
    "named": Estimator(
        '`LongTailClassifier("cosine", scales=[16])`',
        lambda seed: LongTailClassifier("cosine", scales=(16.0,), random_state=seed),
    ),
    "sklearn": Estimator(  # which draws nothing
        SKLEARN,
        lambda seed: LogisticRegression(max_iter=100),
        lambda fitted: {"n_iter": int(fitted.n_iter_[0])},
        seeds=(0,),
    ),
}
_NAMED = {name: each.title for name, each in ESTIMATORS.items()}
TITLES = {"means": MEANS, "post-hoc": POST_HOC, **_NAMED, **{name: each.title for name, each in METHODS.items()}}
TAUS = (0.5, 1.0, 1.5)


def chosen(rows: Sequence[Mapping[str, str]], space: str, method: str) -> dict[str, Any]:
    """The values of the trial with the best accuracy on the validation samples."""
    tried = [row for row in rows if (row["space"], row["method"]) == (space, method)]
    found: dict[str, Any] = json.loads(max(tried, key=lambda row: float(row["accuracy"]))["values"])
    return found


class Study:
    """Trains what the tables lack, one space and method at a time."""

    def __init__(self, folder: Path, rows: list[dict[str, str]], tried: list[dict[str, str]]) -> None:
        self.folder, self.rows, self.tried = folder, rows, tried

    def _add(self, rows: list[dict[str, str]], path: Path, space: str, method: str, **facts: Any) -> None:
        row = {"space": space, "method": method, **facts, "torch": torch.__version__}
        add_row({name: json.dumps(v) if isinstance(v, dict) else v for name, v in row.items()}, rows, path)

    def tune(self, space: str, name: str) -> None:
        """Tune by the climb. Each trial of a linear layer is also measured with the log prior subtracted afterwards."""
        method, given, how = ALL[name], data(self.folder, space, "validation"), SPACES[space]
        axes = {axis: how.fewer.get(axis, values) for axis, values in method.space.items()}
        while points := next_points(axes, self._known(space, name)):
            for values in points:
                start = time.perf_counter()
                network, head = trained(method, values, given, how.batch, how.trial or how.passes, 0)
                facts = {**judged(network, head, given), "seconds": f"{time.perf_counter() - start:.1f}"}
                if name == "linear":
                    for tau in TAUS:
                        found = adjusted(network, head, given, tau)
                        self._add(self.tried, TUNING, space, "post-hoc", values={**values, "tau": tau}, **found)
                self._add(self.tried, TUNING, space, name, values=values, **facts)

    def _known(self, space: str, name: str) -> list[tuple[dict[str, Any], float]]:
        return [
            (json.loads(row["values"]), float(row["accuracy"]))
            for row in self.tried
            if (row["space"], row["method"]) == (space, name)
        ]

    def measure(self, space: str, name: str) -> None:
        """Train three seeds with the chosen values; rows of other values are dropped."""
        samples, how = data(self.folder, space, "test"), SPACES[space]
        names = (name, "post-hoc") if name == "linear" else (name,)
        wanted = {each: chosen(self.tried, space, each) for each in names}
        shown = {each: json.dumps(values) for each, values in wanted.items()}
        stale = [r for r in self.rows if r["space"] == space and r["values"] != shown.get(r["method"], r["values"])]
        self.rows[:] = [row for row in self.rows if row not in stale]
        done = {(row["method"], row["seed"]) for row in self.rows if row["space"] == space}
        for seed in _SEEDS:
            known: dict[str, Any] = {}  # trainings by their values: one serves with and without the prior subtracted
            for each, values in wanted.items():
                if (each, str(seed)) in done:
                    continue
                start, tau = time.perf_counter(), values.get("tau")
                given = {key: value for key, value in values.items() if key != "tau"}
                key = json.dumps(given)
                if key not in known:
                    known[key] = trained(METHODS[name], given, samples, how.batch, how.passes, seed)
                network, head = known[key]
                found = judged(network, head, samples) if tau is None else adjusted(network, head, samples, tau)
                seconds = f"{time.perf_counter() - start:.1f}"
                self._add(self.rows, TABLE, space, each, values=values, seed=seed, **found, seconds=seconds)

    def means(self, space: str) -> None:
        """Measure the class means, which need no training."""
        if not any((row["space"], row["method"]) == (space, "means") for row in self.rows):
            found = of_means(data(self.folder, space, "test"))
            self._add(self.rows, TABLE, space, "means", values={}, seed=0, **found)

    def estimators(self, space: str) -> None:
        """The estimator as it comes, told its loss, and scikit-learn's, on the features as they are."""
        samples = features(self.folder, space, "test")
        done = {(row["method"], row["seed"]) for row in self.rows if row["space"] == space}
        for name, seed in ((name, seed) for name, each in ESTIMATORS.items() for seed in each.seeds):
            if (name, str(seed)) in done:
                continue
            start, classifier = time.perf_counter(), ESTIMATORS[name].make(seed)
            classifier.fit(samples.train.numpy(), samples.labels.numpy())
            seconds = f"{time.perf_counter() - start:.1f}"
            right = torch.from_numpy(classifier.predict(samples.test.numpy())) == samples.test_labels
            found = shares(right, torch.bincount(samples.labels)[samples.test_labels], samples.groups)
            values = ESTIMATORS[name].values(classifier)
            self._add(self.rows, TABLE, space, name, values=values, seed=seed, **found, seconds=seconds)


def _estimators(rows: Sequence[Mapping[str, str]]) -> Iterator[list[str]]:
    """Lines with the results of benchmarks/estimator.py, which has no group of medium classes."""
    for provider, title in (
        ("ltloss LongTailClassifier", AUTO),
        ("sklearn LogisticRegression", SKLEARN),
    ):
        same = [r for r in rows if (r["provider"], r["threads"]) == (provider, "1") and "icons_features" in r["data"]]
        if same:
            cells = [percents([float(row[key]) / 100 for row in same]) for key in ("all", "many", "few")]
            yield [title, "its own", same[0]["chosen"], *cells[:2], "–", cells[2]]


def rendered(page: str, rows: Sequence[Mapping[str, str]], others: Sequence[Mapping[str, str]]) -> str:
    """The page with its tables: features of a file, images, and features of frozen networks."""

    def of(*spaces: str) -> list[Mapping[str, str]]:
        return [row for row in rows if row["space"] in spaces]

    page = renewed(page, "icons", table(of("whitened", "as they are"), others))
    page = renewed(page, "icons as images", table(of(IMAGES)))
    return renewed(page, "frozen networks", by_problem(of(*NETWORKS)))


def _found(rows: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, str, list[str]]]:
    """For each space and method: its names, its values, and accuracy on all samples and on the groups."""
    found: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in rows:
        found.setdefault((row["space"], row["method"]), []).append(row)
    for (space, name), same in found.items():
        values = json.loads(same[0]["values"]).items()
        shown = ", ".join(f"{key}={value}" if isinstance(value, str) else f"{key}={value:g}" for key, value in values)
        yield space, name, [shown, *(percents([float(row[key]) for row in same]) for key in _GROUPS)]


def table(rows: Sequence[Mapping[str, str]], others: Sequence[Mapping[str, str]] = ()) -> str:
    """A line for each method and space, best accuracy first."""
    lines = [*_estimators(others), *([TITLES[name], space, *cells] for space, name, cells in _found(rows))]
    lines.sort(key=lambda line: -float(line[3].split()[0]))
    return markdown_table([["method", "features", "values", "all", "many (>100)", "medium", "few (<20)"], *lines])


def by_problem(rows: Sequence[Mapping[str, str]]) -> str:
    """Accuracy, a line per method and a column per problem; the last line is the estimator's distance to the best."""
    found = {(space, name): cells[1] for space, name, cells in _found(rows)}
    spaces = [name for name in NETWORKS if any(space == name for space, _ in found)]
    lines = [
        [title, *(found.get((space, name), "–") for space in spaces)]
        for name, title in TITLES.items()
        if any((space, name) in found for space in spaces)
    ]
    best = {
        space: max(
            float(cell.split()[0]) for (where, name), cell in found.items() if name not in ESTIMATORS and where == space
        )
        for space in spaces
    }
    behind = [
        f"{best[space] - float(found[space, 'auto'].split()[0]):.1f}" if (space, "auto") in found else "–"
        for space in spaces
    ]
    header = ["method", *(SPACES[space].title for space in spaces)]
    return markdown_table([header, *lines, ['points from "auto" to the best tuned line', *behind]])


def main() -> None:
    """Train what the tables lack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="where the data files lie")
    parser.add_argument("--method", action="append", choices=tuple(ALL), help="which (default: all)")
    parser.add_argument("--space", choices=tuple(SPACES), default="whitened")
    parser.add_argument("--tune", action="store_true", help="only tune: nothing is read of the test samples")
    parser.add_argument("--others", action="store_true", help="more losses; they are only tuned")
    options = parser.parse_args()
    torch.set_num_threads(1)
    study, space = Study(options.data_dir, list(read_rows(TABLE)), list(read_rows(TUNING))), options.space
    if not SPACES[space].learns and not options.tune:
        study.means(space)
    if space in NETWORKS and not options.tune:
        study.estimators(space)
    for name in options.method or (ALL if options.others else METHODS):
        study.tune(space, name)
        if name in METHODS and not options.tune:
            study.measure(space, name)


if __name__ == "__main__":
    main()
