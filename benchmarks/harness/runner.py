"""A provider in this process: built, gated, then timed."""

from __future__ import annotations

import time
from typing import Any

import torch
from fastddpm.benchmarks.harness.case import Case, Prepared, Provider
from fastddpm.benchmarks.harness.clock import make_clock
from torch import Tensor


class LocalRunner:
    """Builds a provider and calls it once.

    Attributes:
        setup_s: seconds to build it.
        first_call_s: seconds of the first call, compilation included.
    """

    def __init__(self, provider: Provider, case: Case, *, smoke: bool = False) -> None:
        self.name, self.provider, self.case, self._smoke = provider.name, provider, case, smoke
        start = time.perf_counter()
        self._work: Prepared = provider.build(case)
        self.setup_s = time.perf_counter() - start
        start = time.perf_counter()
        self._work.run()
        _synchronize(case.device)
        self.first_call_s = time.perf_counter() - start
        self._clock: Any = None

    def call(self) -> None:
        """Do the work once, to its end on the device."""
        self._work.run()
        _synchronize(self.case.device)

    def evaluate(self) -> dict[str, Tensor]:
        """Return what the gate needs, from a fixed state of torch's generators, from which some draw."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self._work.evaluate()

    def warm(self) -> str:
        """Make the stopwatch ready; return what it measures."""
        self._clock = make_clock(self._work.run, self.case.device, small=not self.case.network, smoke=self._smoke)
        return self._clock.how

    def time(self) -> float:
        """Seconds per call."""
        return self._clock.time()

    def peak_memory_mb(self) -> float | None:
        """Not known per provider in a shared process."""
        return None

    def close(self) -> None:
        """Nothing to release."""


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
