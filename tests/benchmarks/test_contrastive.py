"""The benchmark of the contrastive losses refuses what is wrong, and states ratios to the dense form."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial

import pytest

from benchmarks import contrastive as benchmark
from benchmarks.contrastive import CASES, check, rows_of, take
from benchmarks.peers import Shape, errors_of
from benchmarks.step.measure import Found, Work


@pytest.mark.parametrize("name", [name for name in CASES if "open_clip" not in name])
def test_every_case_of_ours_is_right(name: str) -> None:
    assert 0.0 < check(CASES[name], 64) < 1e-4


def test_a_wrong_loss_is_not_timed() -> None:
    right = CASES["siglip_loss: ltloss"]
    wrong = dataclasses.replace(right, build=lambda: lambda x: 1.001 * right.build()(x))
    with pytest.raises(RuntimeError, match="not timed"):
        check(wrong, 64)


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    names = ("info_nce: open_clip", "info_nce: dense")
    assert list(errors_of({name: partial(check, CASES[name], 64) for name in names}, "it")) == ["info_nce: dense"]


def test_rows_state_ratios_and_goals() -> None:
    works = [Work(f"info_nce: {form}", Shape(8192, 8192, 256)) for form in ("ltloss", "dense", "ltloss, s = 100")]
    mib = 1 << 20
    found = [Found([1.0], [1.0], [40 * mib]), Found([2.0], [2.0], [800 * mib]), Found(reason="no memory")]
    rows = rows_of(works, found)
    assert (rows[0]["time_ratio"], rows[0]["memory_ratio"]) == ("0.500", "0.050")
    assert rows[0]["goal"].count("met") == 2
    assert (rows[1]["time_ratio"], rows[1]["goal"]) == ("1.000", "")
    assert rows[2]["note"] == "no memory"
    assert "| info_nce | ltloss | 8192 | 1000.0 | 0.500 | 40.0 | 0.050 |" in benchmark.table(rows)


def test_one_process_measures_time_and_memory() -> None:
    seconds, peak, (loss, _) = take(Work("supervised_contrastive: ltloss", Shape(300, 300, 256)), 2, None)
    assert len(seconds) == 2
    assert min(seconds) > 0.0
    assert peak >= 0
    assert loss > 0.0
