"""Reading one picture from disk: what is accepted, what is refused and why, and the way it becomes pixels."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ltloss.errors import ImageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
MAX_PIXELS = 64_000_000

# `open_picture` has a limit of its own and says so in words; Pillow's warning would come on top, once per thread.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_picture(path: Path) -> Image.Image:
    """Decode a picture: upright, its first frame, over white where it is transparent, mode L or RGB.

    Raises ImageError for an empty, corrupt or foreign file, and for more than MAX_PIXELS pixels (before decoding).
    """
    try:
        if path.stat().st_size == 0:
            raise ImageError("is empty (0 bytes)")
        with Image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"is {width} x {height} pixels, more than the {MAX_PIXELS:,} allowed")
            picture.load()
            return _plain(ImageOps.exif_transpose(picture))
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"has more than the {MAX_PIXELS:,} pixels allowed") from None
    except UnidentifiedImageError:
        raise ImageError("is not a picture that can be read") from None
    except FileNotFoundError:
        raise ImageError("does not exist (any more)") from None
    # Pillow's decoders raise all of these for damaged files.
    except (OSError, ValueError, SyntaxError, IndexError, EOFError, MemoryError, OverflowError) as error:
        raise ImageError(f"is damaged ({' '.join(str(error).split())})") from error


def _plain(picture: Image.Image) -> Image.Image:
    """The same picture as mode L or RGB."""
    if picture.mode.startswith("I") or picture.mode == "F":
        # 16-bit grey: Pillow's own conversion would clip everything above 255 to white.
        values = np.asarray(picture, dtype=np.float64)
        return Image.fromarray((values / 257 if values.max(initial=0) > 255 else values).clip(0, 255).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
        return picture.convert("RGB")
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


def to_pixels(picture: Image.Image, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Pixels (channels, height, width) uint8: the centre at the right aspect ratio, resized with antialiasing."""
    channels, height, width = image_shape
    mode = "L" if channels == 1 else "RGB"
    if picture.mode != mode:
        picture = picture.convert(mode)
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    pixels = np.array(picture)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
