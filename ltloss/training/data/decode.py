"""Read one image from disk: check it, decode it, and turn it into pixels."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ltloss.errors import ImageError, in_one_line

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
MAX_PIXELS = 64_000_000

# `open_image` has its own limit with its own message; Pillow's warning would be a second one, in every thread.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(path: Path) -> Image.Image:
    """Decode the first frame of an image: upright, on white where it is transparent, in mode L or RGB.

    Raises ImageError for an empty, damaged or foreign file, and, before decoding, for more than MAX_PIXELS pixels.
    """
    try:
        if path.stat().st_size == 0:
            raise ImageError("is empty (0 bytes)")
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"is {width} x {height} pixels, more than the {MAX_PIXELS:,} allowed")
            image.load()
            return _plain(ImageOps.exif_transpose(image), str(image.format))
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"has more than the {MAX_PIXELS:,} pixels allowed") from None
    except UnidentifiedImageError:
        raise ImageError("is not an image that can be read") from None
    except FileNotFoundError:
        raise ImageError("does not exist (any more)") from None
    except Exception as error:  # whatever damaged bytes make of Pillow's decoders
        raise ImageError(f"is damaged ({in_one_line(error)})") from error


def _plain(image: Image.Image, file_format: str) -> Image.Image:
    """The same image as mode L or RGB."""
    if image.mode == "F":
        raise ImageError("is floating point, whose white is unknown; write 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        least, most = values.min(initial=0), values.max(initial=0)
        if least < 0 or most > 65535:
            raise ImageError(f"has pixels of {least if least < 0 else most:.0f}, outside 0..65535; write 8 or 16 bits")
        # Pillow's own conversion would clip everything above 255 to white. Only a TIFF of 32 bits does not tell its
        # white; else a dark image has to stay as dark as its neighbours.
        plain = image.mode == "I" and file_format == "TIFF" and most <= 255
        return Image.fromarray((values if plain else values / 257).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def to_pixels(image: Image.Image, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Pixels (channels, height, width) uint8: the centre crop of that aspect ratio, resized with antialiasing."""
    channels, height, width = image_shape
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
