"""Images from files that nobody vouches for: six formats, their sizes checked before a pixel is decoded."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator

from PIL import Image

from fastddpm.files.outside import regular_size

# Pillow tries every format it knows by default, and for PostScript it starts Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_PIXELS = 1 << 26  # 64 megapixels: larger than any camera's frame that one trains 32..512 pixel images on


@contextlib.contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open an image of one of `FORMATS`, whatever the file's name says; a PNG's checksums are compared first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such image, damaged, or declares more than `MAX_PIXELS`; also raised for what goes wrong
            in the body of the ``with``. The message begins with the path.
    """
    regular_size(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"declares {width}x{height} pixels, more than {MAX_PIXELS}; shrink or remove it")
            if image.format == "PNG":
                with Image.open(path, formats=("PNG",)) as again:
                    again.verify()
            yield image
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{os.fspath(path)}: not a usable image: {error}") from error
