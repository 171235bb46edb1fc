"""A line per epoch where nobody watches, a bar per step on a terminal."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from helpers.toys import toy_settings

from ltloss.training.run.trainer import train

pytestmark = pytest.mark.slow


class Terminal(io.StringIO):
    """Looks like a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_line_per_epoch_where_stderr_is_no_terminal(
    toy_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = train(tmp_path / "run", toy_settings(toy_npz, epochs=2)).history
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == ""
    assert [line.partition(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    for line, row in zip(lines, rows, strict=True):
        assert f"loss {row['train_loss']:.3f}" in line
        assert f"test {100 * row['test_accuracy']:.1f} %" in line
        assert f"lr {row['lr']:.3g}" in line
    train(tmp_path / "run", {"epochs": 3}, resume=True)
    assert capsys.readouterr().err.startswith("epoch 3/3: ")


def test_a_bar_per_step_on_a_terminal(toy_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    (row, *_) = train(tmp_path / "run", toy_settings(toy_npz, epochs=1)).history
    shown = terminal.getvalue()
    assert re.findall(r"epoch 1/1.*? (\d)/4 ", shown)[-1] == "4"
    assert f"loss={row['train_loss']:.3f}" in shown
    assert "step/s" in shown
    assert "epoch 1/1:" in shown
    assert f"test={100 * row['test_accuracy']:.1f} %" in shown


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_shows_nothing(terminal: bool, toy_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := Terminal() if terminal else io.StringIO())
    train(tmp_path / "run", toy_settings(toy_npz, epochs=1), quiet=True)
    assert shown.getvalue() == ""
