"""Images from .npy and .npz files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastddpm.checks import one_of
from fastddpm.data.datasets import Dataset, as_floats
from fastddpm.data.values import check_range, range_of, to_x_0
from fastddpm.files.arrays import read_arrays

# More channels than these are recognised where images are square only.
_FEW = 4


def array_file(path: Path, *, value_range: tuple[float, float] | None = None, channels: str | None = None) -> Dataset:
    """Load images, and labels if there are any, from a .npy or .npz file.

    Images are the array ``images`` (or ``arr_0``, or the only one), [N, H, W], [N, H, W, C] or [N, C, H, W] with any C;
    labels are ``labels`` (or ``arr_1``), [N] integers from 0; ``condition`` is what a network sees beside an image, see
    `to_condition`. Values are uint8, uint16 that use more than half of their range, floating point in [-1, 1] of which
    some are negative, or anything in ``value_range``.

    Args:
        value_range: the values of black and white.
        channels: "first" or "last", where the shape does not say it.

    Raises:
        ValueError: the file is damaged, holds objects, declares too much, its arrays are none of the above, or nothing
            says what its axes or values mean.
    """
    value_range = check_range(value_range)
    arrays = read_arrays(path)
    labels, condition = arrays.get("labels"), arrays.get("condition")
    try:
        images = _as_nchw(arrays["images"], channels)
        low, high = float(images.min()), float(images.max())
        value_range = range_of(images.dtype, low, high, value_range)
        plain = images.dtype == np.uint8 and value_range == (0.0, 255.0)
        x = torch.from_numpy(np.array(images if plain else to_x_0(images, value_range), order="C"))
        beside = None if condition is None else to_condition(condition, channels)
        if beside is not None and (len(beside), *beside.shape[2:]) != (len(x), *x.shape[2:]):
            raise ValueError(f"condition has shape {tuple(beside.shape)}, and the images {tuple(x.shape)}")
        if labels is None:
            return Dataset(str(path), x, condition=beside)
        if labels.shape != (len(x),) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(x):
            raise ValueError(f"labels must be {len(x)} integers from 0, got {labels.dtype} {labels.shape}")
    except ValueError as error:
        raise ValueError(f"{path}: not a usable array file: {error}") from error
    classes = tuple(str(i) for i in range(int(labels.max()) + 1))
    return Dataset(str(path), x, torch.from_numpy(labels.astype(np.int64)), classes, beside)


def read_condition(path: Path, count: int) -> Tensor:
    """Return what a network sees beside x for each of ``count`` samples, from the array ``condition``, or the only one.

    Raises:
        ValueError: the file is damaged, or holds neither one row nor one for each.
    """
    arrays = read_arrays(path)
    condition = to_condition(arrays.get("condition", arrays["images"]))
    if len(condition) not in (1, count):
        raise ValueError(f"{path} holds {len(condition)} conditions for {count} samples; give one for each, or one")
    return condition.expand(count, *condition.shape[1:])


def to_condition(values: np.ndarray, channels: str | None = None) -> Tensor:
    """Return what a network sees beside x, [N, C, H, W]: uint8 is mapped to [-1, 1] as pixels are, the rest is kept.

    Raises:
        ValueError: its axes do not say what they are, or a value is not finite.
    """
    values = _as_nchw(values, channels)
    if not np.isfinite(values).all():
        raise ValueError("condition holds NaN or infinity")
    kept = np.uint8 if values.dtype == np.uint8 else np.float32
    return as_floats(torch.from_numpy(np.array(values, kept, order="C")))


def _as_nchw(images: np.ndarray, channels: str | None) -> np.ndarray:
    if channels is not None:
        one_of("channels", channels, ("first", "last"))
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(f"images must be [N, H, W], [N, H, W, C] or [N, C, H, W], got {images.shape}")
    if images.ndim == 3:
        return images[:, None]
    channels = channels or _channels(images.shape)
    return images.transpose(0, 3, 1, 2) if channels == "last" else images


def _channels(shape: tuple[int, ...]) -> str:
    """Tell whether channels are "first" or "last": images are square, or channels few."""
    _, a, b, c = shape
    for first, last in ((b == c, a == b), (a in (1, 3), c in (1, 3)), (a <= _FEW, c <= _FEW)):
        if first != last:
            return "first" if first else "last"
    raise ValueError(
        f"which axis of {shape} holds the channels? Give channels='first' ([N, C, H, W]) or 'last' to load_data, or "
        "--channels first to train"
    )
