"""Images from folders, and from single files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from fastddpm.data.datasets import Dataset
from fastddpm.data.values import check_range, range_of, to_x_0
from fastddpm.files.arrays import check_bytes
from fastddpm.files.image_reader import SUFFIXES, ImageHeader, read_header, read_image


def image_folder(
    folder: Path,
    *,
    resolution: int | None = None,
    value_range: tuple[float, float] | None = None,
    background: str | None = None,
) -> Dataset:
    """Load every image below ``folder``; the names of its direct subfolders are the classes.

    Images are turned as their EXIF data say, cropped to a centred square and resized when ``resolution`` is given.
    They become grey when all of them are grey, RGB otherwise; uint8 when all have 8 bits a channel, float32 in [-1, 1]
    otherwise. Labels need every image to lie in a subfolder. A warning says what is lost.

    Raises:
        ValueError: there are no images, one is damaged, too large or transparent (the file is named), sizes differ, or
            nothing says what the values mean (see `values.range_of`).
    """
    value_range = check_range(value_range)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    headers = [read_header(path) for path in paths]
    _warn_of_losses(folder, paths, headers)
    grey, first = all(header.grey for header in headers), headers[0]
    plain = all(header.dtype == np.uint8 for header in headers) and value_range in (None, (0.0, 255.0))
    height, width = (resolution, resolution) if resolution else (first.height, first.width)
    channels = 1 if grey else 3
    check_bytes(str(folder), len(paths) * channels * height * width * (1 if plain else 4))
    images = np.empty((len(paths), channels, height, width), np.uint8 if plain else np.float32)
    bounds: dict[np.dtype[Any], list[float]] = {}
    for i, path in enumerate(paths):
        pixels = read_image(path, background)
        seen = bounds.setdefault(pixels.dtype, [np.inf, -np.inf])
        seen[:] = float(np.minimum(seen[0], pixels.min())), float(np.maximum(seen[1], pixels.max()))
        pixels = pixels if resolution is None else _fitted(pixels, resolution)
        if pixels.shape[:2] != (height, width):
            raise ValueError(
                f"{path} is {pixels.shape[0]}x{pixels.shape[1]} where {paths[0]} is {height}x{width}; give a resolution"
            )
        images[i] = np.atleast_3d(pixels).transpose(2, 0, 1)
    if not plain:
        ranges = {dtype: _named(folder, dtype, seen, value_range) for dtype, seen in bounds.items()}
        for i, header in enumerate(headers):
            images[i] = to_x_0(images[i], ranges[header.dtype])
    labels, classes = _classes(folder, paths)
    return Dataset(str(folder), torch.from_numpy(images), labels, classes)


def image_file(path: Path, *, resolution: int) -> Dataset:
    """Load one image, cropped to a centred square and shrunk to at most ``resolution`` pixels a side.

    Raises:
        ValueError: it is damaged, too large or transparent, or nothing says what its values mean.
    """
    header = read_header(path)
    _warn_of_losses(path, [path], [header])
    pixels = read_image(path)
    values = _fitted(pixels, min(resolution, header.height, header.width))
    if pixels.dtype != np.uint8:
        values = to_x_0(values, _named(path, pixels.dtype, [float(pixels.min()), float(pixels.max())], None))
    return Dataset(str(path), torch.from_numpy(np.atleast_3d(values).transpose(2, 0, 1).copy())[None])


def _named(
    path: Path, dtype: np.dtype[Any], bounds: list[float], given: tuple[float, float] | None
) -> tuple[float, float]:
    try:
        return range_of(dtype, bounds[0], bounds[1], given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _fitted(pixels: np.ndarray, side: int) -> np.ndarray:
    """Crop [H, W] or [H, W, 3] to a centred square and resize it, in its own depth."""
    plain = pixels.dtype == np.uint8
    image = Image.fromarray(pixels if plain else pixels.astype(np.float32))
    fitted = np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))
    # Lanczos overshoots at edges, beyond black and white.
    return fitted if plain else fitted.clip(pixels.min(), pixels.max())


def _classes(folder: Path, paths: list[Path]) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    loose = [path for path in paths if path.parent == folder]
    if loose:
        if len(loose) < len(paths):
            warnings.warn(
                f"{folder}: {len(loose)} images, {loose[0].name!r} first, lie beside the {len(paths) - len(loose)} in "
                "subfolders, so that there are no classes; move or remove them to train with classes",
                stacklevel=4,
            )
        return None, ()
    parents = [path.relative_to(folder).parts[0] for path in paths]
    classes = tuple(sorted(set(parents)))
    return torch.tensor([classes.index(parent) for parent in parents], dtype=torch.int64, device="cpu"), classes


def _warn_of_losses(source: Path, paths: list[Path], headers: list[ImageHeader]) -> None:
    if files := [path for path, header in zip(paths, headers, strict=True) if header.animated]:
        warnings.warn(
            f"{source}: {len(files)} images, {files[0].name!r} first, lose every frame but the first", stacklevel=4
        )
