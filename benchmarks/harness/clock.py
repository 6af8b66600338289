"""Stopwatches: wall time on the CPU; on CUDA events, small kernels replayed from a graph after a flush of the L2."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fastddpm.machine.devices import synchronisation_raises
from fastddpm.sampling.step_pool import WARMUP_STEPS

# A measurement shorter than this has the clock and the interpreter in it.
MIN_SECONDS = 0.05
_MAX_CALLS = 10_000
_L2_FLUSH_BYTES = 256 << 20


class CpuClock:
    """Wall time of calls in a row, as many as make `min_seconds` together; one where a call takes that long.

    Attributes:
        how: what the numbers are, for the report.
    """

    how = "wall time"

    def __init__(self, run: Callable[[], Any], min_seconds: float = MIN_SECONDS) -> None:
        self._run, self._min_seconds = run, min_seconds
        self._calls = 1 if min_seconds == 0 else None

    def time(self) -> float:
        """Seconds per call."""
        if self._calls is None:
            once = self._measure(1)
            self._calls = max(1, min(_MAX_CALLS, round(self._min_seconds / max(once, 1e-9))))
            if self._calls == 1:
                return once
        return self._measure(self._calls) / self._calls

    def _measure(self, calls: int) -> float:
        run = self._run
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return time.perf_counter() - start


class CudaClock:
    """Time between two events around each call; the median of some calls.

    With `small`, the call is captured as a CUDA graph first, so that the time to launch it is not in the number, and
    the L2 cache is flushed before each call. The flush also gives the host time to get ahead of the device.
    """

    def __init__(self, run: Callable[[], Any], *, small: bool, calls: int = 20) -> None:
        self.calls = calls
        self._run, self._flush, self.how = run, None, "CUDA events"
        if small:
            self._run, captured = _graphed(run)
            self._flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
            self.how = f"CUDA events, L2 flushed, {'replayed from a graph' if captured else 'launched eagerly'}"

    def time(self) -> float:
        """Seconds per call."""
        pairs = []
        for _ in range(self.calls):
            if self._flush is not None:
                self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self._run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def _graphed(run: Callable[[], Any]) -> tuple[Callable[[], Any], bool]:
    """Return the call as a graph's replay; the call itself where it waits for the device, as no graph can."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP_STEPS):
            run()
        waits = _waits(run)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    if waits:
        return run, False
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay, True


def _waits(run: Callable[[], Any]) -> bool:
    """Whether a call waits for the device. A capture would show it too, but leave torch.randn unusable."""
    try:
        with synchronisation_raises():
            run()
    except RuntimeError:
        return True
    return False


def make_clock(run: Callable[[], Any], device: str, *, small: bool, smoke: bool = False) -> CpuClock | CudaClock:
    """Return the stopwatch for a device; `small`: a few kernels rather than a network."""
    if device == "cuda":
        return CudaClock(run, small=small, calls=2 if smoke else 20 if small else 3)
    return CpuClock(run, 0.0 if smoke else MIN_SECONDS)
