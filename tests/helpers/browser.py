"""Open a page in a headless Chromium and ask it what a reader would see. Only the tests marked ``browser`` need one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome found")

_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # whatever a page asks of the network fails
    "--enable-logging=stderr",
    "--window-size=1200,900",
]

# Runs in a copy of the page when everything has loaded, and writes what it finds into the document, which --dump-dom
# prints. It must not wait for anything: the document is printed right after the load event.
_PROBE = """
<script>
addEventListener("load", () => {
  const images = [...document.images];
  const found = {
    title: document.title,
    images: images.map(image => ({alt: image.alt, width: image.naturalWidth, from: image.currentSrc.split(":")[0]})),
    scripts: document.scripts.length - 1,
    text: document.body.innerText,
    figures: [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().width),
    requests: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => /^https?:/.test(name)),
    cut: [...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth).length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  };
  const result = document.createElement("pre");
  result.id = "probe-result";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
});
</script>
"""


@dataclass(frozen=True)
class Rendered:
    """What Chromium made of a page, and every message on its console."""

    found: dict[str, Any]
    console: list[str]


def _run(page: Path, profile: Path, *flags: str, query: str = "") -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", *flags, page.resolve().as_uri() + query]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60, check=True)


def _console(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if ":CONSOLE:" in line or ":CONSOLE(" in line]


def document(page: Path, profile: Path, query: str) -> str:
    """The document of ``page`` with a query, a while after it has loaded: scripts have answered by then."""
    return _run(page, profile, "--virtual-time-budget=15000", "--dump-dom", query=query).stdout


def render(page: Path, profile: Path, *flags: str) -> Rendered:
    """Load ``page`` as it is for its console messages, then a copy with the probe for what it shows.

    The copy lies beside the page, so that relative addresses hold. It has no content security policy, which would
    rightly stop the probe, and loads all images, not only those in view.
    """
    console = _console(_run(page, profile, "--dump-dom").stderr)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    text = text.replace('loading="lazy"', "")
    probed = page.with_name("probed-" + page.name)
    probed.write_text(text.replace("</body>", _PROBE + "</body>"), encoding="utf-8")
    try:
        result = _run(probed, profile, "--dump-dom", *flags)
    finally:
        probed.unlink()
    match = re.search(r'<pre id="probe-result">(.*?)</pre>', result.stdout, re.DOTALL)
    assert match is not None, f"the page did not finish loading: {result.stderr[-2000:]}"
    return Rendered(json.loads(html.unescape(match[1])), console + _console(result.stderr))
