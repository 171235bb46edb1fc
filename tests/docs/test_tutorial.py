"""The tutorial runs, prints what it stores, and becomes a page of the site."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hooks import hook

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
# An accuracy in %: other processors round otherwise, and a training goes another way from there. A tenth of the 150
# images of a group.
_POINTS = 10.0


def _printed(notebook: dict[str, Any]) -> list[str]:
    return ["".join("".join(one["text"]) for one in cell.get("outputs", ())) for cell in notebook["cells"]]


def test_every_cell_prints_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = json.loads(hook("notebook").NOTEBOOK.read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        found = _printed(hook("notebook").executed(stored))
    assert not any(tmp_path.iterdir())
    for cell, (now, before) in enumerate(zip(found, _printed(stored), strict=True), 1):
        assert _NUMBER.sub("#", now).split() == _NUMBER.sub("#", before).split(), f"cell {cell}: make tutorial"
        numbers = (list(map(float, _NUMBER.findall(text))) for text in (now, before))
        assert next(numbers) == pytest.approx(next(numbers), abs=_POINTS), f"cell {cell}: make tutorial"


def test_a_cell_that_fails_is_not_passed_over() -> None:
    with pytest.raises(ZeroDivisionError):
        hook("notebook").executed({"cells": [{"cell_type": "code", "source": ["1 / 0"], "outputs": []}]})


def test_cells_become_text_code_and_what_it_prints() -> None:
    cells = [{"cell_type": "markdown", "source": ["# A\n", "b"]}]
    cells += [{"cell_type": "code", "source": ["x = 2\n", "print(x)"], "outputs": []}]
    executed = hook("notebook").executed({"cells": cells})
    assert hook("notebook").markdown(executed) == "# A\nb\n\n```python\nx = 2\nprint(x)\n```\n\n```text\n2\n```\n"
