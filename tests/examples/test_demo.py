from __future__ import annotations

from pathlib import Path

import pytest
from helpers.refusals import missing

from examples.demo import LOSSES, SCALE, main
from ltloss.errors import UserError

pytestmark = pytest.mark.slow


def test_demo_ends_with_a_table_and_files_to_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert main(["--fast", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    table = (out / "table.txt").read_text()
    assert table in shown
    for group in ("overall", "many (>50)", "medium (10-50)", "few (<10)"):
        assert group in table
    for title, _ in LOSSES.values():
        (line,) = (line for line in table.splitlines() if line.startswith(title))
        assert line.count("±") == 4
    to_open = [Path(line.split()[0]) for line in shown.splitlines() if line.strip().startswith(str(out))]
    assert [path.name for path in to_open] == ["gallery.html", "report.html"]
    assert all(path.is_file() for path in to_open)
    assert len(list((out / "images").rglob("*.png"))) == 359

    def interrupted(*_: object, **__: object) -> None:
        raise UserError("before the first training")

    monkeypatch.setattr("examples.demo.train", interrupted)
    assert main(["--fast", "--out", str(out)]) == 2
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "mine.txt"]


def test_demo_leaves_a_foreign_folder_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine.txt").write_text("keep")
    assert main(["--fast", "--out", str(tmp_path)]) == 2
    assert not missing(capsys.readouterr().err, str(tmp_path / "runs"), "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_losses_of_the_table_have_one_scale() -> None:
    assert {options.get("scale") for name, (_, options) in LOSSES.items() if name != "softmax"} == {SCALE}
