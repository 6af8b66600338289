"""Training data by name: the built-in digit sets, image folders and .npy/.npz arrays.

Nothing from outside is executed or trusted: images are refused by their declared size before a pixel is decoded, and
so are arrays (`fastddpm.files.arrays`). What a file does not say of its values is asked for, never guessed.
"""

from __future__ import annotations

from pathlib import Path

from fastddpm.data.array_file import array_file
from fastddpm.data.datasets import BUILT_IN, Dataset
from fastddpm.data.folder import image_folder


def load_data(
    source: str,
    *,
    resolution: int | None = None,
    value_range: tuple[float, float] | None = None,
    background: str | None = None,
    channels: str | None = None,
) -> Dataset:
    """Load the training images that ``source`` names.

    Args:
        source: "mnist" or "digits8x8" (their training split), an image folder, or a .npy/.npz file.
        resolution: side to crop and resize the images of a folder to; default: the size they have.
        value_range: the values of black and white, for those that do not say it: floating point, signed or 32-bit
            integers, 12 bits in 16.
        background: colour behind the transparent pixels of a folder's images, by name or as "#rrggbb".
        channels: "first" or "last" for an array whose shape does not say it.

    Raises:
        ValueError: the source is unknown, empty, damaged, too large, cannot have that resolution, or does not say what
            its values or axes mean.
    """
    if source in BUILT_IN:
        data = BUILT_IN[source]("train")
    else:
        path = Path(source)
        if path.is_dir():
            return image_folder(path, resolution=resolution, value_range=value_range, background=background)
        if path.suffix not in (".npy", ".npz") or not path.is_file():
            raise ValueError(f"no data at {source!r}; give {', '.join(BUILT_IN)}, an image folder, or a .npy/.npz file")
        data = array_file(path, value_range=value_range, channels=channels)
    if resolution is not None and data.shape[1:] != (resolution, resolution):
        raise ValueError(
            f"{source} holds {data.shape[1]}x{data.shape[2]} images; resolution={resolution} is for folders"
        )
    return data
