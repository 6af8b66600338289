"""The animation of a `Recording`: there and back again, as a GIF."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from fastddpm.pictures import strip as drawing
from fastddpm.pictures.recording import Recording

COLOURS = 64
# Milliseconds that a frame stays: of a long process, of a short one, and at either end.
FRAME, REST, PAUSE = 60, 450, 1500
# From so many states on a process is long.
_LONG = 20
# Inches: of the points' panel, and of those of images, which stand above each other.
_POINTS_SIDE, _IMAGE_SIDE = 4.2, 1.9


def gif(recording: Recording) -> bytes:
    """Draw a recording as an animated GIF that repeats: the forward process to its last state, then the reverse."""
    last = len(recording.indices) - 1
    forward, *reverse = drawing.rows_of(recording)
    there, side = [forward], _POINTS_SIDE
    if not drawing.is_points(recording):
        # As tall as the reverse process, which has the estimate of x_0 beneath.
        there, side = [forward, ("$x_0$", recording.forward[:1].expand_as(recording.forward))], _IMAGE_SIDE
    moments = [(there, k) for k in range(last + 1)] + [(reverse, k) for k in range(last, -1, -1)]
    images = [drawing.pixels(drawing.strip_figure(recording, columns=[k], rows=rows, side=side)) for rows, k in moments]
    rest = REST if last < _LONG else FRAME
    palette = _palette(images[0], images[-1])
    first, *others = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
    stream = io.BytesIO()
    first.save(
        stream,
        format="GIF",
        save_all=True,
        append_images=others,
        duration=[PAUSE if k in (0, last) else rest for _, k in moments],
        loop=0,
        disposal=1,
    )
    return stream.getvalue()


def _palette(*images: Image.Image) -> Image.Image:
    """Return the colours of images of one size, as one that is quantised."""
    sheet = Image.fromarray(np.concatenate([np.asarray(image) for image in images]))
    # By coverage white stays white, which the mean of near-whites is not.
    return sheet.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
