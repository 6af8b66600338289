"""Numbers with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# The 97.5 % quantile of N(0, 1).
Z = 1.959964
RESAMPLES = 400


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One number, of samples and of real images.

    Attributes:
        samples: of the samples.
        real: of real images.
        ratio: samples / real; None where that says nothing.
        against: which real images: "held-out" or "training".
    """

    samples: Estimate
    real: Estimate
    ratio: Estimate | None
    against: str


def proportion(successes: int, n: int) -> Estimate:
    """Estimate a probability from n trials, with Wilson's score interval (1927)."""
    p = successes / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Estimate(p, min(p, centre - half), max(p, centre + half))


def normal(value: float, standard_error: float) -> Estimate:
    """Return value -+ 1.96 standard errors."""
    return Estimate(value, value - Z * standard_error, value + Z * standard_error)


def ratio(a: Estimate, b: Estimate) -> Estimate | None:
    """Return a / b of two independent numbers, to first order in their errors; None where b is 0."""
    if b.value == 0:
        return None
    value = a.value / b.value
    half = math.hypot(a.high - a.low, value * (b.high - b.low)) / (2 * b.value)
    return Estimate(value, max(0.0, value - half), value + half)


def bootstrapped(values: Array, statistic: Callable[[Array], float], seed: int = 0) -> Estimate:
    """Estimate a statistic of values [N], with the percentiles of its bootstrap distribution (Efron 1979)."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    draws = [statistic(generator.choice(values, len(values))) for _ in range(RESAMPLES)]
    return Estimate(statistic(values), *(float(q) for q in np.quantile(draws, (0.025, 0.975))))
