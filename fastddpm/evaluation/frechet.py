"""The Frechet distance between two sets of features, each taken for a Gaussian (Heusel et al. 2017, eq. 6)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastddpm.evaluation.estimate import RESAMPLES, Array, Estimate, Row


class Gaussian(NamedTuple):
    """Mean [D] and covariance [D, D], float64."""

    mean: Array
    covariance: Array


def fit(features: Array, counts: Array | None = None) -> Gaussian:
    """Fit a Gaussian to features [N, D], row i taken counts[i] times (once by default); unbiased covariance."""
    counts = np.ones(len(features)) if counts is None else counts
    n = counts.sum()
    mean = counts @ features / n
    centred = features - mean
    return Gaussian(mean, (centred.T * counts) @ centred / (n - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    S_a S_b has the eigenvalues of the symmetric R S_a R with R = S_b^(1/2), so `eigh` does, singular covariances
    included.
    """
    difference, root = a.mean - b.mean, _square_root(b.covariance)
    eigenvalues = np.linalg.eigvalsh(root @ a.covariance @ root)
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(eigenvalues.clip(0)).sum()
    return max(0.0, float(difference @ difference + trace))


def _square_root(covariance: Array) -> Array:
    eigenvalues, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(eigenvalues.clip(0))) @ vectors.T


def compare(
    samples: Array,
    train: Array,
    held_out: Array,
    *,
    classes: NDArray[np.int64] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Row:
    """Compare samples, and training images, with held-out images; features [N, D] each, equal N.

    The intervals are the bootstrap's, moved onto the estimates: images drawn with replacement are fewer different ones,
    which enlarges the distance, and that part is no uncertainty.

    Args:
        samples, train, held_out: float64 features, N >= 2.
        classes: [N], where row i of all three is of class classes[i]; each class keeps its number of rows in every
            draw, as it has it by choice and not by chance.
        resamples: how many bootstrap draws.

    Returns:
        The distances. That of training images is what a perfect sampler would score, since the estimate from N images
        is too large by about as much for one as for the other.

    Raises:
        ValueError: the numbers of images differ, or there are fewer than two.
    """
    N = len(held_out)
    if not len(samples) == len(train) == N or N < 2:
        raise ValueError(f"{len(samples)}, {len(train)} and {N} images: equally many are compared, at least two")
    once = np.ones(N)
    values = np.array(_both(samples, train, held_out, once, once, once))
    generator = np.random.Generator(np.random.Philox(key=seed))
    counts = np.empty((resamples, 3, N))
    classes = np.zeros(N, np.int64) if classes is None else classes
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        n = len(members)
        counts[:, :, members] = generator.multinomial(n, np.full(n, 1 / n), size=(resamples, 3))
    draws = np.array([_both(samples, train, held_out, *drawn) for drawn in counts])
    deviations = draws - draws.mean(axis=0)
    of_samples, of_train = (_estimate(value, value + d) for value, d in zip(values, deviations.T, strict=True))
    if of_train.value == 0:
        return Row(of_samples, of_train, None, "training")
    ratio = of_samples.value / of_train.value
    # To first order: d(a / b) = (da - a / b db) / b
    ratios = ratio + (deviations[:, 0] - ratio * deviations[:, 1]) / of_train.value
    return Row(of_samples, of_train, _estimate(ratio, ratios), "training")


def _both(samples: Array, train: Array, held_out: Array, *counts: Array) -> tuple[float, float]:
    """Distances of samples and of training images to held-out ones, each row of the three taken so many times."""
    of_samples, of_train, real = (fit(x, c) for x, c in zip((samples, train, held_out), counts, strict=True))
    return frechet_distance(of_samples, real), frechet_distance(of_train, real)


def _estimate(value: float, draws: Array) -> Estimate:
    low, high = np.quantile(draws, (0.025, 0.975)).clip(0)
    return Estimate(float(value), float(low), float(high))
