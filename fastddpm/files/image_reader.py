"""Images from files that nobody vouches for: six formats, sizes checked before pixels, depth and range kept."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageOps

from fastddpm.checks import printable
from fastddpm.files.outside import regular_size

# Pillow tries every format it knows by default, and for PostScript it starts Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_PIXELS = 1 << 26  # 64 megapixels: larger than any camera's frame that one trains 32..512 pixel images on

# What Pillow raises on damaged headers, found by flipping bytes.
_UNREADABLE = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error),
    Image.DecompressionBombError,
)
_TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")
_SIDEWAYS = (5, 6, 7, 8)  # values of EXIF's orientation
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageHeader:
    """What is known of an image before its pixels are decoded.

    Attributes:
        grey: whether it has one channel; it has three else.
        dtype: what `read_image` returns: uint8, uint16, int32 or float32.
        animated: whether it has frames that are not read.
    """

    height: int
    width: int
    grey: bool
    dtype: np.dtype[Any]
    animated: bool


def read_header(path: str | os.PathLike[str]) -> ImageHeader:
    """Read what a file declares of its image.

    Raises:
        ValueError: it is no image of `FORMATS`, damaged, has colours of 16 bits, or declares too many pixels.
    """
    with open_image(path) as image:
        width, height = image.size
        # PNG's own getexif decodes the pixels first, in case the data follow them.
        if Image.Image.getexif(image).get(_ORIENTATION) in _SIDEWAYS:
            width, height = height, width
        mode, dtype = image.mode, _dtype(image)
        # Pillow has no mode for colours of 16 bits; those of a BMP have 5.
        encodings = str([tile[3] for tile in getattr(image, "tile", ())])
        if dtype == np.uint8 and image.format != "BMP" and ";16" in encodings:
            raise ValueError(
                "has colours of 16 bits, of which Pillow reads 8; give the pixels as an array of uint16 [N, H, W, 3] "
                "in a .npy file, or images of 8 bits"
            )
        animated = getattr(image, "is_animated", False) and image.format != "MPO"
        return ImageHeader(height, width, mode in ("1", "L", "F") or mode[0] == "I", dtype, animated)


def read_image(path: str | os.PathLike[str], background: str | None = None) -> np.ndarray:
    """Read an image's first frame, upright, with the values that the file holds.

    Args:
        background: colour behind transparent pixels, by name or as "#rrggbb".

    Returns:
        [H, W] (grey) or [H, W, 3]: uint8 for 8 bits or fewer, uint16 for 16 bits, int32 or float32 for 32.

    Raises:
        ValueError: it is no image of `FORMATS`, damaged, a PNG with a wrong checksum, declares too many pixels, or has
            transparent pixels and there is no background.
    """
    with open_image(path) as image:
        if image.format == "PNG":
            with Image.open(path, formats=("PNG",)) as again:
                again.verify()
        dtype, grey = _dtype(image), image.mode in ("1", "L")
        transparent = image.mode in _TRANSPARENT or "transparency" in image.info
        image = ImageOps.exif_transpose(image)
        if dtype != np.uint8:
            return np.asarray(image).astype(dtype)
        if transparent:
            image = _opaque(image.convert("RGBA"), background)
        return np.asarray(image.convert("L" if grey else "RGB"))


@contextlib.contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open an image of one of `FORMATS`, whatever the file's name says.

    Raises:
        ValueError: it is no such image, damaged, or declares more than `MAX_PIXELS`; also raised for what goes wrong
            in the body of the ``with``. The message begins with the path.
    """
    regular_size(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"declares {width}x{height} pixels, more than {MAX_PIXELS}; shrink or remove it")
            yield image
    except _UNREADABLE as error:
        raise ValueError(printable(f"{os.fspath(path)}: not a usable image: {error}")) from error


def _dtype(image: Image.Image) -> np.dtype[Any]:
    # Pillow before 10.3 opened grey PNGs of 16 bits as "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return np.dtype(np.uint16)
    return np.dtype({"I": np.int32, "F": np.float32}.get(image.mode, np.uint8))


def _opaque(image: Image.Image, background: str | None) -> Image.Image:
    low, _ = image.getchannel("A").getextrema()
    if low == 255:
        return image.convert("RGB")
    if background is None:
        raise ValueError(
            "has transparent pixels; give the colour behind them: load_data(..., background='white') or, to train, "
            "--background white"
        )
    behind = Image.new("RGBA", image.size, ImageColor.getcolor(background, "RGBA"))
    return Image.alpha_composite(behind, image).convert("RGB")
