"""What this machine can do at most, measured in the run that needs it: copying, and multiplying matrices."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from fastddpm.benchmarks.harness.clock import make_clock
from fastddpm.benchmarks.harness.compare import compare

from fastddpm.machine import hardware as machine

# Far beyond the caches: 256 MiB a tensor on a CPU, 1 GiB on a GPU.
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
_SMOKE_BYTES = 4 << 20
_MATRIX = {"cpu": 2048, "cuda": 8192}


def measure(device: str, rounds: int, *, smoke: bool = False) -> dict[str, Any]:
    """Measure copy bandwidth (bytes read plus bytes written) and matrix rates.

    Returns:
        "copy_gb_per_s", "copy_mb" and "gflop_per_s" by dtype that the device computes in; medians over the rounds.
    """
    elements = (_SMOKE_BYTES if smoke else _COPY_BYTES[device]) // 4
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    n = 128 if smoke else _MATRIX[device]
    clocks = {"copy": make_clock(lambda: target.copy_(source), device, small=False, smoke=smoke)}
    # A processor that emulates bfloat16 would take minutes.
    low = device == "cuda" or machine.cpu()["native_bfloat16"]
    for dtype in (torch.float32, torch.bfloat16) if low else (torch.float32,):
        a = torch.randn(n, n, device=device).to(dtype)
        clocks[str(dtype).removeprefix("torch.")] = make_clock(_matmul(a), device, small=False, smoke=smoke)
    seconds = compare({name: clock.time for name, clock in clocks.items()}, rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    copied = 2 * source.numel() * source.element_size()
    return {
        "copy_gb_per_s": copied / medians.pop("copy") / 1e9,
        "copy_mb": copied / 2 / 1e6,
        "gflop_per_s": {name: 2 * n**3 / seconds / 1e9 for name, seconds in medians.items()},
    }


def _matmul(a: torch.Tensor) -> Any:
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a, out=out)
