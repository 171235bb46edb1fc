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
            return _plain(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"has more than the {MAX_PIXELS:,} pixels allowed") from None
    except UnidentifiedImageError:
        raise ImageError("is not an image that can be read") from None
    except FileNotFoundError:
        raise ImageError("does not exist (any more)") from None
    # Pillow's decoders raise all of these for damaged files.
    except (OSError, ValueError, SyntaxError, IndexError, EOFError, MemoryError, OverflowError) as error:
        raise ImageError(f"is damaged ({in_one_line(error)})") from error


def _plain(image: Image.Image) -> Image.Image:
    """The same image as mode L or RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey: Pillow's own conversion would clip everything above 255 to white.
        values = np.asarray(image, dtype=np.float64)
        return Image.fromarray((values / 257 if values.max(initial=0) > 255 else values).clip(0, 255).astype(np.uint8))
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
