"""The benchmark of the estimator: one row a fit, accuracy by class size."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", "1.6")

from helpers.embeddings import tail

from benchmarks import estimator


def test_accuracy_by_class_size() -> None:
    counts = np.array([200, 50, 3])
    labels = np.array([0, 0, 1, 2, 2, 2])
    found = np.array([0, 1, 1, 2, 2, 0])
    assert estimator.accuracies(found, labels, counts) == {"all": "66.67", "few": "66.67", "many": "50.00"}
    assert estimator.accuracies(found[:3], labels[:3], counts)["few"] == ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("name", estimator.PROVIDERS)
def test_a_row(name: str, tmp_path: Path) -> None:
    (x_train, y_train), (x_test, y_test) = tail(), tail(seed=1)
    np.savez(tmp_path / "tail.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    row = estimator.measured(name, tmp_path / "tail.npz", 0, 50)
    assert (row["N"], row["C"], row["data"]) == (393, 6, "tail.npz")
    assert float(row["all"]) > 90.0
    assert 0.0 <= float(row["cpu_seconds"]) < 60.0
    assert int(row["peak_extra_mib"]) < 100
