"""Interleaved rounds A B C A B C, and what they allow to conclude.

A machine's speed drifts by more than the differences worth knowing, so that two numbers compare only where they were
taken next to each other: each round times every runner once, and a ratio is the median of the rounds' own ratios.
Nothing is dropped and nothing is rounded before the end.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

MIN_ROUNDS = 7
# A spread beyond which a result depends more on the machine than on the code.
NOISY = 0.10


class Runner(Protocol):
    """Something that can be timed again and again."""

    @property
    def name(self) -> str:
        """Unique among those compared."""

    def time(self) -> float:
        """Do the work and return seconds per call."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one runner, one value per round."""

    name: str
    seconds: tuple[float, ...]

    @property
    def p50(self) -> float:
        """Median."""
        return statistics.median(self.seconds)

    @property
    def p20(self) -> float:
        """20th percentile."""
        return float(np.quantile(self.seconds, 0.2))

    @property
    def p80(self) -> float:
        """80th percentile."""
        return float(np.quantile(self.seconds, 0.8))

    @property
    def minimum(self) -> float:
        """Fastest round."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """(p80 - p20) / p50."""
        return (self.p80 - self.p20) / self.p50

    @property
    def noisy(self) -> bool:
        """The rounds disagree by more than `NOISY`."""
        return self.spread > NOISY


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the baseline, over the rounds: median, 20th and 80th percentile."""

    median: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" where the middle of the rounds agrees on it, else "tie"."""
        if self.low > 1.0:
            return "faster"
        return "slower" if self.high < 1.0 else "tie"


def compare(runners: Sequence[Runner], rounds: int = MIN_ROUNDS, *, pause: float = 0.0) -> list[Timing]:
    """Time every runner once per round, in the same order each round.

    Args:
        rounds: at least 1; fewer than `MIN_ROUNDS` are for trying out.
        pause: seconds of rest before each measurement, in which threads of the last one stop spinning.

    Raises:
        ValueError: rounds is not positive, or two runners share a name.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if len({runner.name for runner in runners}) != len(runners):
        raise ValueError(f"two runners share a name: {', '.join(runner.name for runner in runners)}")
    seconds: dict[str, list[float]] = {runner.name: [] for runner in runners}
    for _ in range(rounds):
        for runner in runners:
            time.sleep(pause)
            seconds[runner.name].append(runner.time())
    return [Timing(name, tuple(values)) for name, values in seconds.items()]


def ratio(baseline: Timing, other: Timing) -> Ratio:
    """Divide round by round: above 1, `other` is faster than `baseline`.

    Raises:
        ValueError: the two are not of the same rounds.
    """
    if len(baseline.seconds) != len(other.seconds):
        raise ValueError(f"{len(baseline.seconds)} rounds of {baseline.name}, {len(other.seconds)} of {other.name}")
    ratios = [b / o for b, o in zip(baseline.seconds, other.seconds, strict=True)]
    return Ratio(*np.quantile(ratios, (0.5, 0.2, 0.8)).tolist())
