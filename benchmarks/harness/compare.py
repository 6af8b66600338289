"""Interleaved rounds A B C A B C, and what they allow to conclude.

A machine's speed drifts by more than the differences worth knowing, so that two numbers compare only where they were
taken next to each other: each round times every runner once, and a ratio is the median of the rounds' own ratios.
Nothing is dropped and nothing is rounded before the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

MIN_ROUNDS = 7
# A spread beyond which a result depends more on the machine than on the code.
NOISY = 0.10


class Quantiles(NamedTuple):
    """20th, 50th (the median) and 80th percentile over the rounds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """Interpolate between the rounds."""
        return cls(*np.quantile(values, (0.2, 0.5, 0.8)).tolist())

    @property
    def spread(self) -> float:
        """(p80 - p20) / p50."""
        return (self.p80 - self.p20) / self.p50

    @property
    def verdict(self) -> str:
        """Of a ratio: "faster" or "slower" where the middle of the rounds agrees on it, else "tie"."""
        if self.p20 > 1.0:
            return "faster"
        return "slower" if self.p80 < 1.0 else "tie"


def compare(
    clocks: Mapping[str, Callable[[], float]], rounds: int = MIN_ROUNDS, *, pause: float = 0.0
) -> dict[str, list[float]]:
    """Ask every clock once per round, in the same order each round.

    Args:
        clocks: by name; each does the work and returns seconds per call.
        rounds: at least 1; fewer than `MIN_ROUNDS` are for trying out.
        pause: seconds of rest before each measurement, in which threads of the last one stop spinning.

    Returns:
        Seconds by name, one for each round.

    Raises:
        ValueError: rounds is not positive.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds):
        for name, clock in clocks.items():
            time.sleep(pause)
            seconds[name].append(clock())
    return seconds


def ratio(baseline: Sequence[float], other: Sequence[float]) -> Quantiles:
    """Divide round by round: above 1, `other` is faster than `baseline`."""
    return Quantiles.of([b / o for b, o in zip(baseline, other, strict=True)])
