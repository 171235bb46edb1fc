"""The page of classified images by class, least certain first; a section on top shows the least certain of all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from ltloss.training.pages.cards import CARDS_STYLE, THUMBNAIL_SIZE, bar, class_label, embedded, percent, preview
from ltloss.training.pages.html import details, escape, page, table, tiles

if TYPE_CHECKING:
    from ltloss.training.data.images import ImageSource

EMBEDDED_IMAGES = 1000  # up to so many images (some 5 MB) are inside the page; more are in a folder beside it
UNCERTAIN_BELOW = 0.5  # a probability below this counts as uncertain
_UNCERTAIN_SHOWN = 48  # most images in the section on top

_THREADS = 4  # that decode and shrink images
_AT_ONCE = 64  # previews in memory

_STYLE = (
    CARDS_STYLE
    + """.group { content-visibility: auto; contain-intrinsic-size: auto 20rem; }
.contents { columns: 14rem; padding: 0; list-style: none; font-size: .9rem; }
.contents li { overflow-wrap: anywhere; }
"""
)


@dataclass(frozen=True)
class Predictions:
    """The K best classes of N images, best first.

    Attributes:
        index: (N, K) int64 classes, by descending cosine between feature and prototype.
        probability: (N, K) float64, from the softmax over all classes.
        angle: (N,) float64, degrees between the feature and the prototype of the best class, in [0, 180].
    """

    index: np.ndarray
    probability: np.ndarray
    angle: np.ndarray


@dataclass(frozen=True)
class Gallery:
    """What a gallery shows beside the images.

    Args:
        title: the heading.
        origin: one sentence: which images, which model.
        class_names: by class index.
        skipped: (name, reason) of every image that could not be read.
        originals: URL of the folder that the names of the images are relative to (:func:`folder_address`); each image
            then links to its file. None: no links.
    """

    title: str
    origin: str
    class_names: Sequence[str]
    skipped: Sequence[tuple[str, str]] = field(default=())
    originals: str | None = None

    def class_label(self, class_index: int) -> str:
        """The escaped name of a class; "(no name)" for an empty one."""
        return class_label(self.class_names[class_index])


def folder_address(folder: Path, page_folder: Path) -> str:
    """The URL of ``folder`` for a page in ``page_folder``: relative, so that both can move together."""
    try:
        relative = os.path.relpath(folder, page_folder)
    except ValueError:  # another drive on Windows
        return folder.resolve().as_uri()
    # "./": a name such as "javascript:x" must stay a file name
    return "./" + quote(os.fsencode(relative).replace(os.fsencode(os.sep), b"/"))


@dataclass(frozen=True)
class _Cards:
    """Makes the cards of images, a few at a time. Previews are inside the page, or in ``folder`` beside it."""

    predictions: Predictions
    source: ImageSource
    gallery: Gallery
    folder: Path | None
    pool: Executor

    def _address(self, number: int, content: bytes, kind: str) -> str:
        if self.folder is None:
            return embedded(content, kind)
        file = self.folder / f"{number:06d}.{'jpg' if kind == 'jpeg' else kind}"
        if not file.exists():  # the section on top may have written it before
            file.write_bytes(content)
        return f"{self.folder.name}/{file.name}"

    def _linked(self, image: str, name: str) -> str:
        if self.gallery.originals is None:
            return image
        return f'<a href="{escape(self.gallery.originals)}/{quote(os.fsencode(Path(name).as_posix()))}">{image}</a>'

    def card(self, number: int, *, with_class: bool) -> str:
        """The HTML of image ``number``; ``with_class`` adds the class, for sections whose heading does not name it."""
        label, name = self.gallery.class_label, self.source.names[number]
        index, probability = self.predictions.index[number], self.predictions.probability[number]
        predicted, likely = self.gallery.class_names[index[0]], float(probability[0])
        lines = [f'<span class="class">{label(index[0])}</span>'] if with_class else []
        truth = int(self.source.labels[number])
        if truth not in (-1, index[0]):
            lines.append(f'<span class="wrong">✗ labelled {label(truth)}</span>')
        lines.append(f"{bar(likely, low=likely < UNCERTAIN_BELOW)} · {self.predictions.angle[number]:.0f}°")
        if len(index) > 1:
            lines.append(f'<span class="name">or {label(index[1])}, {percent(float(probability[1]))}</span>')
        lines.append(f'<span class="name" title="{escape(name)}">{escape(name)}</span>')
        description = f"{name}: {predicted}, {percent(likely)}"
        image = self._linked(preview(self.source, number, description, partial(self._address, number)), name)
        return f'<figure class="card">{image}<figcaption>{"".join(lines)}</figcaption></figure>'

    def grid(self, numbers: np.ndarray, *, with_class: bool) -> Iterator[str]:
        """Yield the cards of the images ``numbers`` in that order."""
        make = partial(self.card, with_class=with_class)
        yield '<div class="cards">'
        for start in range(0, len(numbers), _AT_ONCE):
            yield from self.pool.map(make, numbers[start : start + _AT_ONCE].tolist())
        yield "</div>"


def _header(cards: _Cards, classes: int) -> Iterator[str]:
    gallery, predictions = cards.gallery, cards.predictions
    count = len(predictions.index)
    labelled = cards.source.labels >= 0
    agreeing = int((cards.source.labels == predictions.index[:, 0]).sum())
    agreement = [("as labelled", f"{agreeing:,} of {labelled.sum():,}")] if labelled.any() else []
    uncertain = int((predictions.probability[:, 0] < UNCERTAIN_BELOW).sum())
    yield f'<h1>{escape(gallery.title)}</h1>\n<p class="quiet">{escape(gallery.origin)}</p>'
    yield tiles(
        [
            ("images classified", f"{count:,}"),
            ("classes found", f"{classes:,} of {len(gallery.class_names):,}"),
            (f"uncertain (below {UNCERTAIN_BELOW:.0%})", f"{uncertain:,}"),
            *agreement,
            ("could not be read", f"{len(gallery.skipped):,}"),
        ]
    )
    place = "inside this page" if cards.folder is None else "in the folder beside this page"
    yield (
        '<p class="quiet">Under each image: the probability of its class, and the angle between its feature and the '
        f"prototype of the class (0° is a perfect match, 90° unrelated). The previews, at most {THUMBNAIL_SIZE} pixels "
        f"wide or high, are {place}.</p>"
    )


def _uncertain(cards: _Cards, by_certainty: np.ndarray) -> Iterator[str]:
    probability = cards.predictions.probability[by_certainty, 0]
    uncertain = by_certainty[probability < UNCERTAIN_BELOW]
    yield '<section id="uncertain">\n<h2>Uncertain</h2>'
    if len(uncertain) == 0:
        yield f"<p>None: every image has a probability of at least {UNCERTAIN_BELOW:.0%}.</p>"
    elif len(uncertain) > _UNCERTAIN_SHOWN:
        yield (
            f"<p>The {_UNCERTAIN_SHOWN} least certain of {len(uncertain):,} images with a probability below "
            f"{UNCERTAIN_BELOW:.0%}. The others are under their classes.</p>"
        )
    if len(uncertain):
        yield from cards.grid(uncertain[:_UNCERTAIN_SHOWN], with_class=True)
    yield "</section>"


def _contents(gallery: Gallery, groups: dict[int, np.ndarray]) -> str:
    entries = "\n".join(
        f'<li><a href="#class-{c}">{gallery.class_label(c)}</a> <span class="quiet">{len(members):,}</span></li>'
        for c, members in groups.items()
    )
    return details(f"Classes ({len(groups):,})", f'<ul class="contents">{entries}</ul>', opened=len(groups) <= 40)


def _body(cards: _Cards) -> Iterator[str]:
    gallery, predictions = cards.gallery, cards.predictions
    by_certainty = np.argsort(predictions.probability[:, 0], kind="stable")
    predicted = predictions.index[by_certainty, 0]
    order = np.argsort(predicted, kind="stable")  # by class, and within it still by certainty
    classes, starts = np.unique(predicted[order], return_index=True)
    groups = dict(zip(classes.tolist(), np.split(by_certainty[order], starts[1:]), strict=True))
    yield from _header(cards, len(groups))
    yield from _uncertain(cards, by_certainty)
    yield f"<section>\n<h2>By class</h2>\n{_contents(gallery, groups)}\n</section>"
    for class_index, members in groups.items():
        heading = f'{gallery.class_label(class_index)} <span class="quiet">{len(members):,}</span>'
        yield f'<section class="group" id="class-{class_index}">\n<h2>{heading}</h2>'
        yield from cards.grid(members, with_class=False)
        yield "</section>"
    if gallery.skipped:
        yield '<section id="skipped">\n<h2>Could not be read</h2>'
        yield table(["image", "reason"], gallery.skipped)
        yield "</section>"


def write_gallery(path: Path, predictions: Predictions, source: ImageSource, gallery: Gallery, *, folder: str) -> None:
    """Write the page that shows every image of ``source`` under the class that was predicted for it.

    Up to :data:`EMBEDDED_IMAGES` images the page is self-contained. For more, the previews go into ``folder`` beside
    the page, and a browser loads those that come into view.

    Args:
        path: the HTML file to write.
        predictions: as :func:`ltloss.training.predict.predict.classify` returns them for ``source``.
        source: the images; if they have labels, wrong predictions are marked.
        gallery: title, class names, skipped images.
        folder: the name of the folder for previews, which must not exist yet.
    """
    beside = path.parent / folder if len(source) > EMBEDDED_IMAGES else None
    if beside is not None:
        beside.mkdir()
    with ThreadPoolExecutor(_THREADS) as pool, path.open("w", encoding="utf-8", newline="\n") as stream:
        cards = _Cards(predictions, source, gallery, beside, pool)
        stream.writelines(page(gallery.title, _body(cards), style=_STYLE))
