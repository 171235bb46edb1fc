"""Our docstrings, as mkdocstrings reads them: Sphinx's roles become links, a section of ours one that it knows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|obj|exc):`(~?)([\w.]+)`")
_PAGE = re.compile(r"(?:``)?docs/([\w-]+)\.md(?:``)?")
_SHOWN = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
_REFERENCE = Path(__file__).parents[1] / "api"
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_ERRORS = re.compile(r"^ +[A-Z]\w+(?:, [A-Z]\w+)+(?=: )", re.MULTILINE)
_ATTRIBUTES = re.compile(r"^Attributes:\n(?:    .*\n?)+", re.MULTILINE)
_NAMES = re.compile(r"^    (\w+(?:, \w+)*)(?=:)", re.MULTILINE)
_RETURNS = re.compile(r"(?<=^Returns:\n)( +)", re.MULTILINE)
_SOURCE = re.compile(r"^(Sources?|See also): ", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites the text of every docstring when its package has been loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Griffe calls this when all modules are known, so that a name can be looked up."""
        shown = set(_places(pkg))
        for thing in _everything(pkg):
            if thing.is_attribute and thing.docstring is None and thing.name in (thing.parent.exports or ()):
                thing.docstring = griffe.Docstring(_comment_above(thing), parent=thing)
            if thing.is_function and thing.name.startswith("__") and thing.name != "__init__":
                thing.parent.del_member(thing.name)  # Python calls it, nobody else
            if thing.docstring is not None:
                thing.docstring.value = _rewritten(thing.docstring.value, thing, shown)


def _places(package: Any) -> Iterator[str]:
    """The paths of all that the pages of the reference show, each where it is defined."""
    for page in _REFERENCE.glob("*.md"):
        for path in _SHOWN.findall(page.read_text(encoding="utf-8")):
            yield from _with_members(package[path.removeprefix("ltloss.")])


def _with_members(thing: Any) -> Iterator[str]:
    yield str(thing.canonical_path)
    names = thing.exports if thing.is_module else [name for name in thing.members if not name.startswith("_")]
    for member in (thing[name] for name in names or () if thing.is_module or thing.is_class):
        yield from () if member.is_module else _with_members(member)


def _everything(module: griffe.Module) -> list[Any]:
    found: list[Any] = [module]
    for member in module.members.values():
        if not member.is_alias:
            found += _everything(member) if member.is_module or member.is_class else [member]
    return found


def _rewritten(text: str, thing: Any, shown: set[str]) -> str:
    text = _ROLE.sub(lambda role: _link(role[2], bool(role[1]), thing, shown), text)
    text = _PAGE.sub(lambda page: f"[{page[1]}](../{page[1]}.md)", text)
    text = _ERRORS.sub(lambda errors: errors[0].replace(", ", " | "), text)
    text = _ATTRIBUTES.sub(lambda section: _NAMES.sub(lambda names: _with_type(names, thing), section[0]), text)
    text = _RETURNS.sub(r"\1: ", text)  # no type before this colon, whatever comes after it
    return _SOURCE.sub(r"*\1*: ", _EXAMPLE.sub("Examples:", text))


def _with_type(names: re.Match[str], thing: Any) -> str:
    """A line of attributes as it is, or with an empty type: Griffe would give it that of the line before."""
    try:
        typed = thing[names[1]].annotation is not None
    except (KeyError, AttributeError):
        typed = False
    return names[0] if typed else names[0].replace(", ", ",\N{NO-BREAK SPACE}") + " ()"


def _link(name: str, short: bool, thing: Any, shown: set[str]) -> str:
    """To the reference, where it has the name; the name alone otherwise."""
    words = name.rsplit(".", 1)[-1] if short else name
    path = _found(name, thing)
    return f"[`{words}`][{path}]" if path in shown else f"`{words}`"


def _found(name: str, thing: Any) -> str | None:
    """The path of what a docstring means by a name, where it is defined."""
    try:
        absolute = name.startswith("ltloss.")
        found = thing.package[name.removeprefix("ltloss.")] if absolute else thing.package[thing.resolve(name)[7:]]
        return str(found.canonical_path)
    except (KeyError, griffe.GriffeError):
        return None


def _comment_above(attribute: Any) -> str:
    """The comment that stands on the lines above an assignment."""
    lines: list[str] = []
    for line in reversed(attribute.module.source.splitlines()[: attribute.lineno - 1] if attribute.lineno else []):
        if not line.startswith("#"):
            break
        lines.insert(0, line.removeprefix("#").strip())
    return " ".join(lines) or "See its value."
