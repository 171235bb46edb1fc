"""Tables in the documentation, between marks at which a command renews them."""

from __future__ import annotations

import re
from collections.abc import Sequence


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is the header; a bar in a cell is escaped."""
    with_rule = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in with_rule)


def renewed(page: str, name: str, text: str) -> str:
    """The page with ``text`` between ``<!-- NAME -->`` and ``<!-- end of NAME -->``.

    Raises:
        ValueError: the page does not have exactly one such place.
    """
    marked = f"<!-- {name} -->\n\n{text}\n\n<!-- end of {name} -->"
    page, found = re.subn(f"<!-- {name} -->.*<!-- end of {name} -->", lambda _: marked, page, flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"the page has {found} places for the table {name!r}")
    return page
