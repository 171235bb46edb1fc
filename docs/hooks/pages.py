"""What MkDocs does not know of our pages: links into the repository.

A link to a file outside of ``docs/`` leads to the repository, at ``extra.repository`` of ``mkdocs.yml``; where that is
not set, its text and the path are left.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)")
_LINK_OR_CODE = re.compile(rf"{_LINK.pattern}|{_FENCE.pattern}|(`+)(?!`).+?\5", _FENCE.flags)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """MkDocs calls this for every page, before it is rendered."""
    docs = Path(config.docs_dir)
    root = Path(config.config_file_path).parent
    folder = docs.relative_to(root).as_posix()
    at = posixpath.dirname(posixpath.join(folder, page.file.src_uri))  # of the page, from the root

    def rewritten(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(at, link["target"]))
        if path.startswith(f"{folder}/"):
            return link[0]
        return _in_the_repository(link["text"], path, config.extra.get("repository"))

    # Links in code are no links.
    return _LINK_OR_CODE.sub(lambda found: found[0] if found["text"] is None else rewritten(found), markdown)


def _in_the_repository(text: str, path: str, repository: str | None) -> str:
    if repository:
        return f"[{text}]({repository.rstrip('/')}/blob/main/{path})"
    named = os.path.basename(path) in text
    return text if named else f"{text} (`{path}`)"
