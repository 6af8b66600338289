"""Benchmark: settings of the sampler's loop on CUDA, one turned at a time; which of them should be the default?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastddpm.benchmarks.bench_sampling import fastddpm_loop
from fastddpm.benchmarks.harness import loop_gate
from fastddpm.benchmarks.harness.case import Benchmark, Case, Prepared, Provider
from fastddpm.benchmarks.peers import networks


def _with(**options: Any) -> Callable[[Case], Prepared]:
    return lambda case: fastddpm_loop(case, torch.bfloat16, **options)


def _cudnn_benchmark(case: Case) -> Prepared:
    """Have cuDNN time its convolutions when the first call meets their shapes, and take the fastest."""
    prepared = fastddpm_loop(case, torch.bfloat16)

    def run() -> Any:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=torch.backends.cudnn.allow_tf32):
            return prepared.run()

    return Prepared(run, prepared.evaluate)


def cases(device: str, smoke: bool) -> list[Case]:
    """Ho et al.'s CIFAR-10 network where launches, half-filled waves and bandwidth bind; none on a CPU."""
    if smoke:
        return [Case("settings", 2, networks.shape("tiny"), "tiny", 3, device=device)]
    batches = (1, 16, 256) if device == "cuda" else ()
    return [Case("settings", batch, networks.shape("cifar10"), "cifar10", 20, device=device) for batch in batches]


def _needs_cuda(case: Case) -> str | None:
    return None if case.device == "cuda" else "the fused normalisation is for CUDA"


BENCHMARK = Benchmark(
    name="settings",
    title="Settings of the loop",
    providers=(
        Provider("fastddpm", _with(), "bfloat16", compiled=True),
        Provider("fastddpm, no CUDA graph", _with(cuda_graph=False), "bfloat16", compiled=True),
        Provider("fastddpm, cudnn.benchmark", _cudnn_benchmark, "bfloat16", compiled=True),
        Provider("fastddpm, fused norms", _with(norm="fused"), "bfloat16", compiled=True, skips=_needs_cuda),
        Provider("fastddpm, not compiled", _with(compile=False), "bfloat16"),
    ),
    cases=cases,
    check=loop_gate.check,
    isolated=True,
)
