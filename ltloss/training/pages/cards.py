"""Small previews of images, and the cards that hold them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from PIL import Image

from ltloss.errors import UserError
from ltloss.training.pages.html import escape

if TYPE_CHECKING:
    from ltloss.training.data.images import ImageSource

THUMBNAIL_SIZE = 160  # pixels of the longer side
_CRISP_BELOW = 65  # images smaller than this are shown enlarged without smoothing, so that pixels can be seen

CARDS_STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.25rem, 1fr)); gap: .75rem; margin: .75rem 0; }
.card { background: var(--card); border-radius: .5rem; overflow: hidden; margin: 0; font-size: .8rem;
  line-height: 1.35; }
.card img, .card .missing { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain;
  background: color-mix(in srgb, var(--line) 45%, transparent); }
.card .missing { display: grid; place-items: center; padding: .5rem; text-align: center; color: var(--quiet); }
.crisp { image-rendering: pixelated; }
.card figcaption { padding: .4rem .6rem .55rem; }
.card .name { color: var(--quiet); display: block; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.card .class { display: block; overflow-wrap: anywhere; font-weight: 600; }
.card .wrong { display: block; color: var(--contrast); overflow-wrap: anywhere; }
.bar { display: block; height: 4px; margin: .25rem 0; border-radius: 2px; background: var(--line); }
.bar i { display: block; height: 100%; border-radius: 2px; background: var(--accent); }
.bar.low i { background: var(--contrast); }
"""


def class_label(name: str) -> str:
    """The escaped name of a class; "(no name)" for an empty one."""
    return escape(name) or "(no name)"


def percent(probability: float) -> str:
    """A probability in percent; less than 1 is never shown as 100%."""
    if 0.9995 <= probability < 1:
        return "> 99.9%"
    return f"{100 * probability:.1f}%"


def thumbnail(image: Image.Image) -> tuple[bytes, str]:
    """A small copy of an image of mode L or RGB as (bytes, "png" or "jpeg").

    Tiny images keep every pixel, as PNG.
    """
    stream = io.BytesIO()
    image.info.clear()  # drops the colour profile, comments and the location
    if max(image.size) < _CRISP_BELOW:
        image.save(stream, "PNG", optimize=True)
        return stream.getvalue(), "png"
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    image.save(stream, "JPEG", quality=82)
    return stream.getvalue(), "jpeg"


def embedded(content: bytes, kind: str) -> str:
    """The data URL of a preview inside the page."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def preview(source: ImageSource, number: int, description: str, address: Callable[[bytes, str], str] = embedded) -> str:
    """The HTML of image ``number`` of a source; ``address`` turns its bytes and their kind into a URL."""
    try:
        content, kind = thumbnail(source.image(number))
    except UserError as error:  # removed or damaged since it was classified
        return f'<div class="missing">{escape(error)}</div>'
    crisp = ' class="crisp"' if kind == "png" else ""
    return (
        f'<img src="{address(content, kind)}" alt="{escape(description)}"{crisp} loading="lazy" '
        f'decoding="async" width="{THUMBNAIL_SIZE}" height="{THUMBNAIL_SIZE}">'
    )


def bar(probability: float, *, low: bool = False) -> str:
    """A probability as a bar and in percent; a ``low`` one has another colour."""
    kind = " low" if low else ""
    return f'<span class="bar{kind}"><i style="width:{100 * probability:.0f}%"></i></span>{percent(probability)}'
