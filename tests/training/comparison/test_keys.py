"""Results of a comparison are found again by their keys, also after settings were added."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest
from helpers.refusals import refused

from ltloss.errors import UserError
from ltloss.training.comparison.grid import ComparisonSpec
from ltloss.training.comparison.jobs import Job


def _key(**given: Any) -> str:
    return Job({"data": "digits", "seed": 0, "loss": "softmax", **given}, "00").key


def test_a_key_is_that_of_before_the_training_options() -> None:
    assert _key() == "softmax-seed0-bc0763794412c59e"
    assert _key(optimizer="sgd", accumulate=1, ema=0.0, clip_norm=None) == _key()
    options = ({"optimizer": "adamw"}, {"accumulate": 2}, {"ema": 0.9}, {"clip_norm": 1.0}, {"augment": "randaugment"})
    assert len({_key(), *(_key(**given) for given in options)}) == 1 + len(options)


def test_a_key_knows_the_weights_that_a_run_begins_with(tmp_path: Path) -> None:
    before, again, elsewhere = (tmp_path / name for name in ("before.pt", "again.pt", "elsewhere.pt"))
    for path, value in ((before, 0.0), (again, 1.0), (elsewhere, 0.0)):
        path.write_bytes(struct.pack("<d", value))
    first = _key(init_from=str(before))
    assert first == _key(init_from=str(elsewhere)) != _key(init_from=str(again))
    os.replace(again, before)
    assert _key(init_from=str(before)) != first
    with refused("missing.pt", "does not exist", error=UserError):
        _key(init_from=str(tmp_path / "missing.pt"))


@pytest.mark.parametrize("given", [{"validation_fraction": 0.1}, {"early_stopping": 3}, {"tensorboard": True}])
def test_what_belongs_to_a_run_is_refused(given: dict[str, Any]) -> None:
    with refused(next(iter(given)), error=UserError):
        ComparisonSpec({"data": "digits", **given}, ("ce",), None, 1, {}, False, 1, None)


def test_rates_are_searched_around_that_of_the_optimizer() -> None:
    def rates(recipe: str | None, **given: Any) -> list[float]:
        spec = ComparisonSpec({"data": "digits", "device": "cpu", **given}, ("ce",), recipe, 1, {}, False, 1, None)
        found: list[float] = spec.space("ce")["lr"]
        return found

    assert 0.05 in rates(None)
    assert 0.1 in rates("small")
    assert 0.002 in rates(None, optimizer="adamw")
    assert rates("small", optimizer="adamw") == rates(None, optimizer="adamw")
