from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers.refusals import refused
from helpers.toys import toy_settings

from ltloss.errors import UserError
from ltloss.training.measure.metrics import COLUMNS
from ltloss.training.run.trainer import train


@pytest.mark.slow
def test_every_number_of_the_table_once_also_after_a_resume(toy_npz: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    train(out, toy_settings(toy_npz, epochs=2, tensorboard=True), quiet=True)
    history = train(out, {"epochs": 3}, resume=True, quiet=True).history
    found = reader.EventAccumulator(str(out / "tensorboard")).Reload()
    measured = {name for name in COLUMNS if any(row[name] is not None for row in history)}
    assert set(found.Tags()["scalars"]) == measured - {"epoch"}
    for name in ("train_loss", "test_accuracy", "lr"):
        events = found.Scalars(name)
        assert [event.step for event in events] == [1, 2, 3]
        assert [event.value for event in events] == pytest.approx([row[name] for row in history])
    assert len(list((out / "tensorboard").iterdir())) == 1


def test_without_the_package_nothing_begins(toy_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with refused("--tensorboard", "pip install 'ltloss[tensorboard]'", error=UserError):
        train(tmp_path / "run", toy_settings(toy_npz, tensorboard=True), quiet=True)
    assert not (tmp_path / "run").exists()
