"""Fit of ``ltloss.sklearn.LongTailClassifier`` beside scikit-learn's LogisticRegression: time, memory, accuracy.

    python -m benchmarks.estimator FEATURES.npz                 # ours with three seeds, theirs once
    python -m benchmarks.estimator FEATURES.npz --only ours

FEATURES.npz holds x_train (N, D), y_train, x_test and y_test; features are used as float32. Each fit has its own
process and adds a row to ``results/estimator.csv``:

* wall-clock and processor seconds; on a shared machine compare the latter
* peak memory beyond the data
* accuracy on the test split: of all samples, of classes with fewer than 20 training samples, and with more than 100

OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE are removed from the environment, because they slow NumPy's products. On a shared
machine set OMP_NUM_THREADS=1, because threads that wait for each other count as work.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import RESULTS, fresh_processes, peak_extra_bytes, read_rows, stamp, write_rows

Row = dict[str, Any]
FEW, MANY = 20, 100


def _ours(seed: int, iterations: int) -> Any:
    from ltloss.sklearn import LongTailClassifier

    return LongTailClassifier(random_state=seed)


def _theirs(seed: int, iterations: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=iterations)


PROVIDERS: Mapping[str, Callable[[int, int], Any]] = {
    "ltloss LongTailClassifier": _ours,
    "sklearn LogisticRegression": _theirs,
}


def accuracies(found: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> Row:
    """Accuracy in percent on all samples, and on those of classes with few or many training samples."""
    right, size = found == labels, counts[labels]
    groups = {"all": size >= 0, "few": size < FEW, "many": size > MANY}
    return {name: f"{100 * right[group].mean():.2f}" if group.any() else "" for name, group in groups.items()}


def measured(name: str, data: Path, seed: int, iterations: int) -> Row:
    """One fit: time, memory and test accuracy."""
    with np.load(data, allow_pickle=False) as file:
        x_train, x_test = (file[part].astype(np.float32) for part in ("x_train", "x_test"))
        y_train, y_test = (file[part].astype(np.int64) for part in ("y_train", "y_test"))
    warm = np.arange(len(x_train)) % max(1, len(x_train) // 500) == 0  # loads libraries, starts threads
    classifier = PROVIDERS[name](seed, 1)
    seconds: dict[str, float] = {}

    def fit() -> None:
        clock, processor = time.perf_counter(), time.process_time()
        classifier.fit(x_train, y_train)
        seconds["seconds"] = time.perf_counter() - clock
        seconds["cpu_seconds"] = time.process_time() - processor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # n_iter shows a fit that did not converge
        classifier.fit(x_train[warm], y_train[warm] % 10)
        classifier = PROVIDERS[name](seed, iterations)
        peak = peak_extra_bytes(fit, lambda: None)
    shape = {"N": len(x_train), "D": x_train.shape[1], "C": len(classifier.classes_)}
    return {
        "provider": name,
        "data": data.name,
        **shape,
        "seed": seed,
        **{kind: f"{value:.1f}" for kind, value in seconds.items()},
        "peak_extra_mib": f"{peak / (1 << 20):.0f}",
        **accuracies(classifier.predict(x_test), y_test, np.bincount(y_train)),
        "n_iter": int(np.max(classifier.n_iter_)),
        "chosen": getattr(classifier, "loss_", "lbfgs"),
        "calibration_error": f"{getattr(classifier, 'calibration_error_', None) or float('nan'):.4f}",
        **stamp(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the rows; rows of other providers, data or numbers of threads stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="of ours; the other one draws nothing")
    parser.add_argument("--iterations", type=int, default=100, help="at most, of LogisticRegression")
    parser.add_argument("--only", choices=("ours", "theirs"))
    parser.add_argument("--out", type=Path, default=RESULTS / "estimator.csv")
    given = parser.parse_args(arguments)
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        os.environ.pop(name, None)
    ours, theirs = PROVIDERS
    runs = [(ours, seed) for seed in range(given.seeds)] if given.only != "theirs" else []
    runs += [(theirs, 0)] if given.only != "ours" else []
    threads = stamp()["threads"]
    renewed = {(name, given.data.name, threads) for name, _ in runs}
    kept = (row for row in read_rows(given.out) if (row["provider"], row["data"], row["threads"]) not in renewed)
    rows: list[Mapping[str, Any]] = list(kept)
    for name, seed in runs:
        with fresh_processes(1) as pool:
            rows.append(pool.submit(measured, name, given.data, seed, given.iterations).result())
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        write_rows(rows, given.out)


if __name__ == "__main__":
    main()
