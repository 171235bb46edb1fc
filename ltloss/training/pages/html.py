"""Self-contained HTML pages: no script, no request to other hosts, readable on a phone and in dark mode.

Everything that comes from outside (class names, file names, settings) goes through :func:`escape`. The content security
policy of every page also forbids scripts and foreign requests, in case an escape is ever forgotten.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ltloss.training.pages.plots import Plot

# Control characters are not allowed in HTML, not even as references. Surrogates cannot be encoded: Python uses them for
# bytes of a file name that are not UTF-8.
_UNSHOWABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")

# The two data colours are, near enough, the blue and the vermilion of Okabe and Ito's palette, and in the dark their
# sky blue and orange: people with any of the common colour deficiencies tell these apart.
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2327; --quiet: #5a646b; --line: #d5dadd; --ground: #fff; --card: #f5f7f8;
  --accent: #0072b2; --contrast: #c2500a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9eb; --quiet: #a3adb4; --line: #3a4348; --ground: #14181a;
  --card: #1d2225; --accent: #56b4e9; --contrast: #f0a030; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
p { margin: .5rem 0; max-width: 48rem; }
a { color: var(--accent); }
.quiet { color: var(--quiet); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.25rem .3rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
th { color: var(--quiet); font-weight: 600; overflow-wrap: normal; }  /* in two lines where a wide font needs it */
td:first-child { min-width: 9rem; }  /* names break between words, not inside them, before a table scrolls */
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
@media (max-width: 34rem) { th, td { padding-right: .6rem; }
  td:first-child { min-width: 5rem; }
  .stacked, .stacked tbody { display: block; }
  .stacked thead { display: none; }
  .stacked tr { display: block; padding: .4rem 0; border-bottom: 1px solid var(--line); }
  .stacked td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; }
  .stacked td:first-child { font-weight: 600; }
  .stacked td::before { content: attr(data-label); color: var(--quiet); font-weight: 400; } }
summary { cursor: pointer; color: var(--accent); padding: .25rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0; padding: 0; }
.tile { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; display: flex; flex-direction: column;
  justify-content: space-between; }
.tile dt { color: var(--quiet); font-size: .8rem; }
.tile dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
"""


PLOTS_STYLE = """
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 2rem; }
.plots > * { margin: 0; min-width: 0; max-width: 40rem; }
.plots figcaption { font-weight: 600; margin-bottom: .35rem; }
.plots svg { display: block; width: 100%; height: auto; background: #fff; border-radius: .5rem; }
.plots .about { font-weight: 400; color: var(--quiet); font-size: .85rem; display: block; }
"""


def showable(value: object) -> str:
    """``value`` as text in which control characters and the bytes of a file name that are not UTF-8 show as �."""
    return _UNSHOWABLE.sub("\ufffd", str(value))


def escape(value: object) -> str:
    """``value`` as :func:`showable` text that is safe in HTML, inside and outside quoted attributes."""
    return html.escape(showable(value), quote=True)


def table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, numeric: Sequence[int] = (), stacked: bool = False
) -> str:
    """A table of escaped cells; the columns in ``numeric`` (counted from 0) are set flush right.

    ``stacked`` is for many columns: on a phone each row becomes a list of its cells, which name their columns.
    """
    kind = [' class="number"' if column in numeric else "" for column in range(len(header))]
    named = [f' data-label="{escape(cell)}"' if stacked else "" for cell in header]
    head = "".join(f"<th{kind[i]}>{escape(cell)}</th>" for i, cell in enumerate(header))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind[i]}{named[i]}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    opening = '<table class="stacked">' if stacked else "<table>"
    return f'<div class="scroll">{opening}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def tiles(items: Iterable[tuple[str, str]]) -> str:
    """The key numbers at the top of a page, given as (title, number)."""
    cards = "".join(f'<div class="tile"><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>' for k, v in items)
    return f'<dl class="tiles">{cards}</dl>'


def figure(plot: Plot, about: str) -> str:
    """A figure for an element of class ``plots``; the text ``about`` says what it shows."""
    return (
        f'<figure>\n<figcaption>{escape(plot.title)}<span class="about">{escape(about)}</span></figcaption>\n'
        f'<div role="img" aria-label="{escape(plot.alt)}">{plot.svg}</div></figure>'
    )


def details(summary: str, content: str, *, opened: bool = False) -> str:
    """A section that can be folded. ``content`` is HTML, ``summary`` is text."""
    return f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>\n{content}\n</details>"


def page(title: str, body: Iterable[str], *, style: str = "") -> Iterator[str]:
    """Yield a page in pieces, so that it is never whole in memory. ``title`` is text, ``body`` is HTML."""
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src 'self' data:; "
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="generator" content="ltloss">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n"
    )
    for piece in body:
        yield piece
        yield "\n"
    yield "</body>\n</html>\n"
