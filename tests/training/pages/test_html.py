from __future__ import annotations

from pathlib import Path

import pytest
from helpers.browser import needs_chromium, render
from helpers.pages import Page
from helpers.small_run import HOSTILE

from ltloss.training.pages.html import page, table


def write(path: Path, *tables: str) -> Path:
    path.write_text("".join(page("T", tables)), encoding="utf-8")
    return path


def test_cells_of_a_stacked_table_name_their_columns(tmp_path: Path) -> None:
    found = Page(write(tmp_path / "p.html", table(HOSTILE, [HOSTILE], numeric=(1,), stacked=True)))
    found.check()
    assert [cell["data-label"] for cell in found.all("td")] == [*HOSTILE]
    assert ["class" in cell for cell in found.all("td")] == [False, True, *[False] * (len(HOSTILE) - 2)]


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
def test_no_column_is_off_a_phones_screen(tmp_path: Path) -> None:
    header, row = ["method", *(f"column {n}" for n in range(12))], ["long-tail", *["12.34 ± 5.67"] * 12]
    path = write(tmp_path / "p.html", table(header, [row], numeric=range(1, 13), stacked=True))
    rendered = render(path, tmp_path / "profile", "--window-size=390,800")
    assert rendered.console == []
    assert rendered.found["cut"] == 0
