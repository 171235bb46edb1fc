"""requirements.lock has every pin of constraints.txt that `make` installs, each with hashes, and no other source."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PIN = re.compile(r"^([\w.-]+)==([^\s;]+)", re.MULTILINE)
_OF_COMMANDS = {"build", "uv", "kernels", "umap-learn"}  # for single targets, and of extras that `make` leaves out


def _pins(text: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, version in _PIN.findall(text):
        found.setdefault(name, set()).add(version)
    return found


def test_the_lock_holds_what_is_pinned() -> None:
    locked = _pins((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    pinned = _pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    off = {name: (pinned[name], locked.get(name)) for name in pinned if locked.get(name) != pinned[name]}
    assert set(off) == _OF_COMMANDS, f"make lock, and commit the result: {off}"


def test_every_line_of_the_lock_is_a_version_with_hashes() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    entry = re.compile(r"[a-z0-9-]+==[\w.]+ (; [^:@]+)?(\s+--hash=sha256:[0-9a-f]{64})+")
    assert [line for line in entries if not entry.fullmatch(line)] == []


def test_the_lock_has_what_the_project_asks_for() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (extras,) = re.findall(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    lists = [re.findall(rf"^{name} = \[(.*?)\]", project, re.MULTILINE | re.DOTALL) for name in extras.split()]
    lists.append(re.findall(r"^dependencies = \[(.*?)\]", project, re.MULTILINE | re.DOTALL))
    asked = {name for (some,) in lists for name in re.findall(r'"([\w-]+)', some)}
    assert asked <= set(_pins((ROOT / "requirements.lock").read_text(encoding="utf-8")))
