"""Images from samples: 8-bit values, grids, and files that are either complete or not there."""

from __future__ import annotations

import io
import logging
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastddpm.checks import integer
from fastddpm.files.atomic import write_files

logger = logging.getLogger("fastddpm")

# Grey, RGB and RGBA.
_PNG_CHANNELS = (1, 3, 4)


def to_uint8(x: Tensor) -> Tensor:
    """Map [-1, 1] to 0..255: round(255 clamp(x / 2 + 1/2, 0, 1)), halves to even, as diffusers' pipelines do.

    Args:
        x: floating point, any shape; NaN becomes 0, and uint8 is kept.

    Returns:
        uint8, same shape.
    """
    if x.dtype == torch.uint8:
        return x
    scaled = (x.to(torch.float32) / 2 + 0.5).clamp(0, 1).nan_to_num(0.0) * 255
    return scaled.round().to(torch.uint8)


def make_grid(images: Tensor, columns: int | None = None, gap: int = 2, ground: int = 0) -> Tensor:
    """Lay images out row by row.

    Args:
        images: uint8 [N, C, H, W], N >= 1.
        columns: images per row; default the square root of N, rounded up.
        gap: pixels between images and around them.
        ground: their value.

    Returns:
        uint8 [C, rows * (H + gap) + gap, columns * (W + gap) + gap].

    Raises:
        ValueError: images of another shape, or no images.
    """
    if images.dim() != 4 or len(images) == 0:
        raise ValueError(f"a grid needs images [N, C, H, W] with N >= 1, got shape {tuple(images.shape)}")
    N, C, H, W = images.shape
    columns = min(N, columns or math.ceil(math.sqrt(N)))
    rows = math.ceil(N / columns)
    size = (C, rows * (H + gap) + gap, columns * (W + gap) + gap)
    grid = torch.full(size, ground, dtype=torch.uint8, device="cpu")
    for i, image in enumerate(images.cpu()):
        top, left = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        grid[:, top : top + H, left : left + W] = image
    return grid


def save_grid(images: Tensor, path: str | os.PathLike[str], *, columns: int | None = None, scale: int = 4) -> None:
    """Write images side by side as one PNG, atomically.

    Args:
        images: [N, C, H, W], N >= 1, with 1, 3 or 4 channels: uint8, or floating point in [-1, 1] as samples are; NaN
            is drawn black, with a warning.
        path: the file; a complete one is replaced.
        columns: images per row; default the square root of N, rounded up.
        scale: each pixel becomes a square of this side.

    Raises:
        ValueError: images of another shape, no images, or a scale that is no positive integer.
        OSError: the file cannot be written; a previous file is intact.
    """
    scale = integer("scale", scale, 1)
    if images.isnan().any():
        logger.warning("%s: NaN is drawn black; sample(..., check_finite=True) names the step that made it", path)
    pixels = to_uint8(images)
    enlarged = pixels.repeat_interleave(scale, -2).repeat_interleave(scale, -1) if pixels.dim() == 4 else pixels
    save_png(path, make_grid(enlarged, columns))


def has_image_shape(shape: tuple[int, ...]) -> bool:
    """Tell whether one sample of this shape can be written as a PNG: (1, 3 or 4 channels, H, W)."""
    return len(shape) == 3 and shape[0] in _PNG_CHANNELS


def save_png(path: str | os.PathLike[str], image: Tensor) -> None:
    """Write one image atomically.

    Args:
        path: the file; a complete one is replaced.
        image: uint8 [C, H, W] with 1, 3 or 4 channels.

    Raises:
        ValueError: the shape is no image's, or the dtype not uint8.
        OSError: the file cannot be written; a previous file is intact.
    """
    if not has_image_shape(tuple(image.shape)) or image.dtype != torch.uint8:
        raise ValueError(f"a PNG needs uint8 [1, 3 or 4 channels, H, W], got {image.dtype} {tuple(image.shape)}")
    pixels = image.cpu().permute(1, 2, 0).numpy()
    encoded = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if image.shape[0] == 1 else pixels).save(encoded, format="PNG")
    write_files({Path(path): encoded.getvalue()})


def save_npz(path: str | os.PathLike[str], **arrays: Any) -> None:
    """Write arrays to an .npz atomically; equal arrays give equal bytes.

    Raises:
        OSError: the file cannot be written; a previous file is intact.
    """
    write_files({Path(path): lambda stream: np.savez(stream, **arrays)})


def join_npz(path: Path, parts: Sequence[Path]) -> None:
    """Write the arrays of several .npz files end to end, as `save_npz` would; one part is in memory at a time.

    Raises:
        OSError: a part is missing, or the file cannot be written; a previous file is intact.
        ValueError: a part is damaged.
    """

    def of_each(name: str) -> Iterator[np.ndarray]:
        for part in parts:
            with np.load(part, allow_pickle=False) as arrays:
                yield arrays[name]

    def write(stream: IO[bytes]) -> None:
        with np.load(parts[0], allow_pickle=False) as first:
            names = list(first)
        # As np.savez: not compressed, and of no date.
        with zipfile.ZipFile(stream, "w") as archive:
            for name in names:
                first, N = next(of_each(name)), sum(len(array) for array in of_each(name))
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    header = np.lib.format.header_data_from_array_1_0(first)
                    np.lib.format.write_array_header_1_0(member, {**header, "shape": (N, *first.shape[1:])})
                    for array in of_each(name):
                        member.write(array.tobytes())

    write_files({path: write})
