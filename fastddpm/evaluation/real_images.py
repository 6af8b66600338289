"""The real images that samples are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.data.datasets import BUILT_IN, Dataset
from fastddpm.data.load import load_data


@dataclass(frozen=True)
class Reference:
    """Real images.

    Attributes:
        train: those that the model learned from.
        held_out: others of the same kind; None where nothing was held out.
    """

    train: Dataset
    held_out: Dataset | None


def load_reference(source: str, shape: tuple[int, ...], **options: Any) -> Reference:
    """Load a built-in set with what was held out of it, or a user's images.

    Args:
        source: "mnist", "digits8x8", an image folder (its images are cropped and resized to the shape), or a .npy/.npz
            file.
        shape: of one sample, (C, H, W).
        **options: value_range, background and channels of `load_data`.

    Raises:
        ValueError: the source is unusable (see `load_data`), or its images have another shape.
    """
    if source in BUILT_IN:
        reference = Reference(BUILT_IN[source]("train"), BUILT_IN[source]("test"))
    else:
        square = len(shape) == 3 and shape[1] == shape[2] and Path(source).is_dir()
        reference = Reference(load_data(source, resolution=shape[1] if square else None, **options), None)
    if reference.train.shape != shape:
        raise ValueError(f"the model draws {shape}, {source} holds images {reference.train.shape}; give other --data")
    return reference


def comparable(sets: Sequence[Dataset]) -> list[Dataset]:
    """Return the sets as they are where all have the same classes, and otherwise without labels."""
    if all(s.labels is not None and s.classes == sets[0].classes for s in sets):
        return list(sets)
    return [Dataset(s.name, s.images) for s in sets]


def matched(sets: Sequence[Dataset], seed: int = 0) -> list[Tensor]:
    """Choose from each set equally many images of each class, as many as the set with the fewest has.

    Args:
        sets: comparable sets; without labels all images are of one class.
        seed: which images are taken of those there are.

    Returns:
        Indices into each set, [N] int64, N the same for all; class by class, so that the classes agree row by row.

    Raises:
        ValueError: not a single image is left.
    """
    labels = [torch.zeros(len(s), dtype=torch.int64, device="cpu") if s.labels is None else s.labels for s in sets]
    classes = max(1, len(sets[0].classes))
    counts = torch.stack([torch.bincount(own, minlength=classes) for own in labels]).amin(dim=0)
    if not counts.any():
        raise ValueError(f"{' and '.join(s.name for s in sets)} have no class in common")
    return [_choose(own, counts.tolist(), seed) for own in labels]


def _choose(labels: Tensor, counts: list[int], seed: int) -> Tensor:
    chosen = []
    for label, count in enumerate(counts):
        generator = np.random.Generator(np.random.Philox(key=[seed, label]))
        chosen.append(generator.permutation(np.flatnonzero(labels.numpy() == label))[:count])
    return torch.from_numpy(np.concatenate(chosen))


def subset(images: Dataset, k: Tensor) -> Dataset:
    """Return images k ([N] int64) of a set."""
    return Dataset(images.name, images.images[k], None if images.labels is None else images.labels[k], images.classes)
