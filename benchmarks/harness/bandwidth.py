"""What this machine can do at most, measured in the run that needs it: copying far beyond the caches."""

from __future__ import annotations

import statistics

import torch
from fastddpm.benchmarks.harness.clock import make_clock

# 256 MiB a tensor on a CPU, 1 GiB on a GPU.
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
_SMOKE_BYTES = 4 << 20


def measure(device: str, rounds: int, *, smoke: bool = False) -> dict[str, float]:
    """Measure copy bandwidth: bytes read plus bytes written, the median over the rounds.

    Returns:
        "copy_gb_per_s", and the size of a tensor as "copy_mb".
    """
    source = torch.ones((_SMOKE_BYTES if smoke else _COPY_BYTES[device]) // 4, device=device)
    target = torch.empty_like(source)
    clock = make_clock(lambda: target.copy_(source), device, small=False, smoke=smoke)
    seconds = statistics.median(clock.time() for _ in range(rounds))
    size = source.numel() * source.element_size()
    return {"copy_gb_per_s": 2 * size / seconds / 1e9, "copy_mb": size / 1e6}
