"""Euclidean distances between pictures, of pixel values in [-1, 1]: is a sample a copy, and do samples differ?"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastddpm.data.datasets import Dataset
from fastddpm.evaluation.estimate import Array, Estimate, normal
from fastddpm.machine.ranks import ALONE, Ranks

# Numbers of a block of images in float64 (64 MB); at least one image.
_BLOCK = 2**23


def nearest_distances(data: Dataset, reference: Dataset, ranks: Ranks = ALONE, *, skip: Tensor | None = None) -> Array:
    """Return the distance from each image to the nearest of the reference, float64 [N].

    Args:
        reference: images of the same shape.
        skip: [N] int64, for each image a reference image that does not count: itself, where it is one of them.
    """

    def of(rows: Tensor) -> Tensor:
        x, nearest = _flat(data, rows), torch.full((len(rows),), math.inf, dtype=torch.float64, device="cpu")
        for columns in _blocks(reference):
            distances = torch.cdist(x, _flat(reference, columns))
            if skip is not None:
                distances[skip[rows, None] == columns] = math.inf
            nearest = torch.minimum(nearest, distances.amin(dim=1))
        return nearest

    return ranks.each(of, _blocks(data)).numpy()


def diversity(data: Dataset, ranks: Ranks = ALONE) -> Estimate | None:
    """Return the mean distance between two images of the same class, averaged over the classes that have two.

    It is a U-statistic: with d_i the mean distance of image i to the other n - 1 of its class, the mean of the d_i has
    the standard error 2 std(d_i) / sqrt(n) (Hoeffding 1948).

    Returns:
        The estimate, or None if no class has two images.
    """
    labels = torch.zeros(len(data), dtype=torch.int64, device="cpu") if data.labels is None else data.labels
    means, variances = [], []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        n = len(members)
        if n < 2:
            continue
        d = _sums(data, members, ranks) / (n - 1)
        means.append(d.mean())
        variances.append(4 * d.var(ddof=1) / n)
    if not means:
        return None
    return normal(float(np.mean(means)), math.sqrt(sum(variances)) / len(means))


def _sums(data: Dataset, members: Tensor, ranks: Ranks) -> Array:
    """Sum of each member's distances to all of them, float64 [len(members)]."""
    part = Dataset(data.name, data.images[members])

    def of(rows: Tensor) -> Tensor:
        total = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
        for columns in _blocks(part):
            distances = torch.cdist(_flat(part, rows), _flat(part, columns))
            # cdist leaves a little of the rounding error on the diagonal.
            total += distances.masked_fill(rows[:, None] == columns, 0).sum(dim=1)
        return total

    return ranks.each(of, _blocks(part)).numpy()


def _blocks(data: Dataset) -> tuple[Tensor, ...]:
    return torch.arange(len(data), device="cpu").split(max(1, _BLOCK // math.prod(data.shape)))


def _flat(data: Dataset, k: Tensor) -> Tensor:
    return data.x_0(k).flatten(1).double()
