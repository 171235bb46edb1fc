"""What MkDocs does not know of our pages: sections of other files, and links into the repository.

A line that begins with ``<!-- include README.md#limits -->`` becomes that section of the file, without its heading;
what follows on the line is for readers of the repository. A link to a file outside of ``docs/`` leads to the
repository, at ``extra.repository`` of ``mkdocs.yml``; where that is not set, its text and the path are left.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pymdownx.slugs import slugify

_INCLUDE = re.compile(r"^<!-- include (?P<file>[\w./-]+)#(?P<anchor>\S+) -->.*$", re.MULTILINE)
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)")
_LINK_OR_CODE = re.compile(rf"{_LINK.pattern}|{_FENCE.pattern}|(`+)(?!`).+?\5", _FENCE.flags)
_HEADING = re.compile(r"^(#+) (.*)$", re.MULTILINE)
_slug = slugify(case="lower")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """MkDocs calls this for every page, before it is rendered."""
    docs = Path(config.docs_dir)
    root = Path(config.config_file_path).parent
    folder = docs.relative_to(root).as_posix()
    at = posixpath.dirname(posixpath.join(folder, page.file.src_uri))  # of the page, from the root

    def included(found: re.Match[str]) -> str:
        text = section((root / found["file"]).read_text(encoding="utf-8"), found["anchor"])
        beside = posixpath.dirname(found["file"])

        def moved(link: re.Match[str]) -> str:
            target = posixpath.relpath(posixpath.join(beside, link["target"]), at)
            return f"{link['image']}[{link['text']}]({target}{link['anchor'] or ''})"

        return _outside_code(text, moved)

    def rewritten(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(at, link["target"]))
        if path.startswith(f"{folder}/"):
            return link[0]
        return _in_the_repository(link["text"], path, config.extra.get("repository"))

    return _outside_code(_INCLUDE.sub(included, markdown), rewritten)


def section(text: str, anchor: str) -> str:
    """What stands under the heading with this anchor, up to the next one of its rank or above.

    Raises:
        ValueError: no such heading.
    """
    found = list(_HEADING.finditer(_FENCE.sub(lambda code: " " * len(code[0]), text)))  # a comment in code is none
    for heading in found:
        if _slug(heading[2], "-") == anchor:
            rank, start = len(heading[1]), heading.end()
            ends = (other.start() for other in found if other.start() > start and len(other[1]) <= rank)
            return text[start : next(ends, len(text))].strip()
    raise ValueError(f"no heading with the anchor {anchor!r}; there are {[_slug(one[2], '-') for one in found]}")


def _outside_code(text: str, change: Callable[[re.Match[str]], str]) -> str:
    """Change every link of a text that does not stand in code."""
    return _LINK_OR_CODE.sub(lambda found: found[0] if found["text"] is None else change(found), text)


def _in_the_repository(text: str, path: str, repository: str | None) -> str:
    if repository:
        return f"[{text}]({repository.rstrip('/')}/blob/main/{path})"
    named = os.path.basename(path) in text
    return text if named else f"{text} (`{path}`)"
