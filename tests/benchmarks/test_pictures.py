"""README and docs show what the committed rows give, and nothing that was typed."""

from __future__ import annotations

import re
from importlib import metadata
from xml.etree import ElementTree

import pytest

from benchmarks.pictures import MADE, ROOT

_PINNED = re.search(r'^matplotlib==(\S+); python_version >= "3.11"', (ROOT / "constraints.txt").read_text(), re.M)


def _texts(svg: str) -> list[str]:
    return [text for one in ElementTree.fromstring(svg).iter("{*}text") if (text := one.text)]


@pytest.mark.parametrize("name", MADE)
def test_the_committed_file_is_the_one_of_the_committed_rows(name: str) -> None:
    committed = (ROOT / name).read_text(encoding="utf-8")
    made = MADE[name](committed)
    if name.endswith(".svg"):
        assert _texts(made) == _texts(committed), "make pictures, and commit the result"
        if _PINNED is None or metadata.version("matplotlib") != _PINNED[1]:
            return  # another one sets its lines elsewhere
    assert made == committed, "make pictures, and commit the result"


def test_every_place_of_the_pages_is_renewed() -> None:
    """A table between marks that no row makes any more would stay as it is for ever."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        marks = re.findall(r"<!-- end of (.*?) -->", text)
        emptied = text
        for mark in marks:
            emptied = re.sub(f"(<!-- {mark} -->).*?(<!-- end of {mark} -->)", r"\1\2", emptied, flags=re.DOTALL)
        name = page.relative_to(ROOT).as_posix()
        assert (MADE[name](emptied) if marks else emptied) == text, f"{name}: add its tables to benchmarks/pictures.py"
