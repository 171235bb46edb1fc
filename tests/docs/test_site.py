"""The site builds strictly, needs no network, and its reference has every public name."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from helpers.browser import document, needs_chromium, render
from helpers.hooks import hook

import ltloss

ROOT = Path(__file__).parents[2]

# Public modules that ``import ltloss`` does not name.
_OTHERS = ("interop.insightface", "interop.pytorch_metric_learning", "margins", "runtime", "sklearn")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("material", "mkdocstrings_handlers", "sklearn"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class _Fetched(HTMLParser):
    """Addresses that a browser asks for by itself, which leaves out what a reader may click."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "source", "iframe", "object", "video", "audio"):
            named = dict(attributes)
            self.addresses += [named[key] or "" for key in ("src", "href", "data", "srcset") if key in named]


def fetched(folder: Path) -> dict[str, list[str]]:
    """By file, the addresses elsewhere that its pages and its styles load something from."""
    found = {}
    for page in folder.rglob("*.html"):
        parser = _Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        found[page.relative_to(folder).as_posix()] = parser.addresses
    for style in folder.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        found[style.relative_to(folder).as_posix()] = re.findall(r"""(?:url\(|@import)\s*["']?([^"')]+)""", text)
    elsewhere = re.compile(r"\s*(https?:)?//")
    return {name: some for name, all_ in found.items() if (some := [one for one in all_ if elsewhere.match(one)])}


def public_names() -> list[str]:
    names = [name for name in ltloss.__all__ if isinstance(getattr(ltloss, name), ModuleType)]
    modules = [ltloss, *(importlib.import_module(f"ltloss.{name}") for name in (*names, *_OTHERS))]
    return [f"{module.__name__}.{name}" for module in modules for name in module.__all__]


def test_it_needs_no_network_and_has_every_public_name(site: Path) -> None:
    assert fetched(site) == {}
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    shown = {line.partition(" ")[0] for line in inventory.splitlines()}
    missing = [name for name in public_names() if name not in shown]
    assert not missing, "add them to a page of docs/api"
    assert "accuracy in %" in (site / "tutorial.html").read_text(encoding="utf-8")


def test_what_a_page_fetches_is_found(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text('<a href="https://a/"></a><script src=//b/c.js></script><img src="d.png">')
    (tmp_path / "one.css").write_text("@import 'https://e/f.css'; p { background: url(g.png) }")
    assert fetched(tmp_path) == {"page.html": ["//b/c.js"], "one.css": ["https://e/f.css"]}


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("width", [1400, 500])
def test_pages_opened_from_disk_work_as_they_are(site: Path, tmp_path: Path, width: int) -> None:
    for name in ("index", "kernels", "api/losses"):
        seen = render(site / f"{name}.html", tmp_path / "profile", f"--window-size={width},900")
        assert seen.console == [], name
        assert seen.found["requests"] == [], name
        assert seen.found["overflow"] == 0, name


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
def test_the_search_works_from_disk(site: Path, tmp_path: Path) -> None:
    found = document(site / "index.html", tmp_path, "?q=kahan")
    assert 'href="' + (site / "optim.html").as_uri() in found


def on_a_page(text: str, repository: str | None = None) -> str:
    config = SimpleNamespace(
        docs_dir=str(ROOT / "docs"), config_file_path=str(ROOT / "mkdocs.yml"), extra={"repository": repository}
    )
    place = SimpleNamespace(file=SimpleNamespace(src_uri="a/page.md"))
    return str(hook("pages").on_page_markdown(text, page=place, config=config, files=None))


@pytest.mark.parametrize(
    ("written", "without", "with_address"),
    [
        ("[a](b.md#c)", "[a](b.md#c)", "[a](b.md#c)"),
        ("[`x.csv`](../../r/x.csv)", "`x.csv`", "[`x.csv`](https://h/blob/main/r/x.csv)"),
        ("[the rows](../../r/x.csv)", "the rows (`r/x.csv`)", "[the rows](https://h/blob/main/r/x.csv)"),
        ("`f[a](../../b)` [c](https://d)", "`f[a](../../b)` [c](https://d)", "`f[a](../../b)` [c](https://d)"),
        ("```python\nf[a](../../b)\n```\n", "```python\nf[a](../../b)\n```\n", "```python\nf[a](../../b)\n```\n"),
    ],
)
def test_links_out_of_the_documentation(written: str, without: str, with_address: str) -> None:
    assert on_a_page(written) == without
    assert on_a_page(written, repository="https://h/") == with_address


def test_docstrings_become_what_the_reference_can_show() -> None:
    pytest.importorskip("griffe")
    import griffe

    package = griffe.load(
        "ltloss", search_paths=[ROOT], extensions=griffe.load_extensions(ROOT / "docs/hooks/docstrings.py")
    )
    loss = package["functional.margin_cross_entropy"].docstring.value
    assert "[`ltloss.default_scale`][ltloss.losses.defaults.default_scale]" in loss
    assert "    ValueError | TypeError: " in loss
    assert "*Sources*: Wang et al." in loss
    assert "\nExamples:\n    >>> import torch\n" in loss
    assert "Returns:\n    : A scalar" in loss
    assert "[evidence](../evidence.md)" in package["losses.long_tail.LongTailLoss"].docstring.value
    estimator = package["sklearn.LongTailClassifier"].docstring
    (section,) = (one for one in estimator.parse("google", warnings=False) if one.kind == "attributes")
    types = {one.name: str(one.annotation or "") for one in section.value}
    assert types["classes_"] != ""
    assert types["prototypes_,\N{NO-BREAK SPACE}intercept_"] == "", "not that of the attribute before"
    assert "`ltloss.ops`" in package["margins"].docstring.value, "no page shows it, so there is no link"
    assert package["export.METADATA"].docstring is not None
