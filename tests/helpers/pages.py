"""Read a page without a browser: which elements it has, whether they are balanced, and what it would load."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

_VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The elements of a page as (tag, attributes), its text, and the tags left open or closed twice."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.path = path
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.unbalanced: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        self.unbalanced += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()
        else:
            self.unbalanced.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        """The attributes of every element of that kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def check(self) -> None:
        """Assert what holds for each of our pages: well formed, no script or handler, nothing from elsewhere."""
        assert not self.unbalanced
        assert not self.all("script")
        assert not self.all("link")
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        for tag, attributes in self.elements:
            assert not [name for name in attributes if name.startswith("on")]
            source = attributes.get("src", "")
            if source and not source.startswith("data:"):
                assert (self.path.parent / source).is_file(), source
            if tag == "img":
                assert attributes["alt"]
            target = attributes.get("href", attributes.get("xlink:href", ""))
            assert not target or target.startswith(("#", "./", "data:image/png;")), target
            if target.startswith("#"):
                assert target[1:] in ids
        assert "url(http" not in self.path.read_text(encoding="utf-8")
