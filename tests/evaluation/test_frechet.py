"""Frechet distances against scipy and closed forms, and intervals against scipy and simulation."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from fastddpm.evaluation.estimate import Estimate, bootstrapped, proportion, ratio
from fastddpm.evaluation.frechet import Gaussian, compare, fit, frechet_distance


def features(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, d)) @ np.random.default_rng(9).normal(size=(d, d)) + shift


def test_frechet_distance_matches_scipys_matrix_root() -> None:
    a, b = fit(features(50, 8, 0)), fit(features(60, 8, 1, shift=0.5))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    difference = a.mean - b.mean
    expected = difference @ difference + np.trace(a.covariance + b.covariance - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_commuting_gaussians_is_closed_form() -> None:
    generator = np.random.default_rng(0)
    rotation = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    s_a, s_b = generator.uniform(0.1, 2, 6), generator.uniform(0.1, 2, 6)
    # The first direction has no variance at all: eigh takes a singular covariance, a Cholesky factor would not.
    s_a[0] = 0.0
    mu = generator.normal(size=6)
    a = Gaussian(np.zeros(6), (rotation * s_a**2) @ rotation.T)
    b = Gaussian(mu, (rotation * s_b**2) @ rotation.T)
    assert frechet_distance(a, b) == pytest.approx(mu @ mu + ((s_a - s_b) ** 2).sum(), rel=1e-6)


def test_frechet_distance_of_fewer_images_than_features_to_itself_is_0() -> None:
    a = fit(features(5, 12, 0))
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-5)


def test_fit_matches_numpy_and_counts_repeat_rows() -> None:
    x = features(20, 3, 0)
    counts = np.arange(20) % 3
    for gaussian, rows in ((fit(x), x), (fit(x, counts.astype(float)), x.repeat(counts, axis=0))):
        np.testing.assert_allclose(gaussian.mean, rows.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(gaussian.covariance, np.cov(rows, rowvar=False), rtol=1e-10)


def test_compare_puts_samples_of_the_same_distribution_at_ratio_1() -> None:
    same = compare(features(200, 4, 0), features(200, 4, 1), features(200, 4, 2), resamples=100)
    assert same.ratio is not None
    assert same.ratio.low < 1 < same.ratio.high
    for estimate in (same.samples, same.real, same.ratio):
        assert estimate is not None
        assert 0 <= estimate.low <= estimate.value <= estimate.high


def test_compare_finds_the_distance_of_shifted_samples() -> None:
    # The Gaussians differ by the mean alone: the distance is 4 shift^2, and the estimate's bias is little beside it.
    shifted = compare(features(400, 4, 0, shift=2.0), features(400, 4, 1), features(400, 4, 2), resamples=100)
    standard_error = (shifted.samples.high - shifted.samples.low) / (2 * 1.96)
    assert abs(shifted.samples.value - 16) < 5 * standard_error < 10
    assert shifted.ratio is not None
    assert shifted.ratio.low <= shifted.ratio.value <= shifted.ratio.high
    assert shifted.ratio.value > 10


def test_compare_keeps_the_classes_as_large_as_they_are() -> None:
    # Two classes far apart, equally large in every set: which of them is drawn how often is no source of error.
    classes = np.arange(100) % 2
    sets = [features(100, 3, seed) + 50.0 * classes[:, None] for seed in range(3)]
    stratified, pooled = (compare(*sets, classes=c, resamples=50) for c in (classes, None))
    assert stratified.real.high - stratified.real.low < (pooled.real.high - pooled.real.low) / 5
    assert stratified.samples.value == pooled.samples.value


def test_compare_of_training_images_that_are_the_held_out_ones_has_no_ratio() -> None:
    x = np.zeros((10, 2))
    assert compare(features(10, 2, 0), x, x, resamples=5).ratio is None


def test_compare_refuses_unequal_numbers() -> None:
    with pytest.raises(ValueError, match="4, 5 and 5 images: equally many"):
        compare(features(4, 2, 0), features(5, 2, 1), features(5, 2, 2))


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (970, 1000), (1, 3)])
def test_proportion_matches_scipys_wilson_interval(successes: int, n: int) -> None:
    interval = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    estimate = proportion(successes, n)
    assert astuple(estimate) == pytest.approx((successes / n, interval.low, interval.high), abs=1e-6)


def test_ratio_has_the_error_of_both() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(10, 0.4, 20_000), generator.normal(5, 0.1, 20_000)
    low, high = np.quantile(a / b, (0.025, 0.975))
    half_a, half_b = 1.96 * 0.4, 1.96 * 0.1
    of_both = ratio(Estimate(10, 10 - half_a, 10 + half_a), Estimate(5, 5 - half_b, 5 + half_b))
    assert of_both is not None
    assert astuple(of_both) == pytest.approx((2, low, high), rel=0.02)
    assert ratio(of_both, Estimate(0.0, 0.0, 0.0)) is None


def test_bootstrapped_median_has_the_error_of_a_median() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    estimate = bootstrapped(values, lambda v: float(np.median(v)))
    assert estimate.value == np.median(values)
    # sqrt(pi / 2) / sqrt(n) for a normal distribution
    assert (estimate.high - estimate.low) / (2 * 1.96) == pytest.approx(np.sqrt(np.pi / 2 / 2000), rel=0.2)
