"""What a sampling loop asks of a GPU and of the host, per step, from torch.profiler's record of CUDA calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fastddpm.benchmarks import bench_sampling as sampling
from fastddpm.benchmarks.harness.case import Case
from fastddpm.benchmarks.peers import networks

LAUNCHES = frozenset(
    (
        "cudaLaunchKernel",
        "cudaLaunchKernelExC",
        "cuLaunchKernel",
        "cuLaunchKernelEx",
        "cudaGraphLaunch",
        "hipLaunchKernel",
    )
)
# Calls in which the host waits for the device. PyTorch ends a read of the device's memory in one of them.
SYNCHRONISATIONS = frozenset(
    ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "hipStreamSynchronize")
)
_STEPS = 10


@dataclasses.dataclass(frozen=True)
class CudaCalls:
    """Calls of a stretch of code: launches by the host, kernels that ran, waits of the host."""

    launches: int
    kernels: int
    syncs: int


def tally(events: Iterable[Any]) -> CudaCalls:
    """Count the events of a profile; a range that a library names (Inductor does) is no kernel."""
    launches = kernels = syncs = 0
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels += not (event.is_user_annotation or event.name.startswith(("Memcpy", "Memset")))
        else:
            launches += event.name in LAUNCHES
            syncs += event.name in SYNCHRONISATIONS
    return CudaCalls(launches, kernels, syncs)


def why_skipped() -> str | None:
    """Return why there is no CUDA part; None if there can be one."""
    if torch.cuda.is_available():
        return None
    build = torch.version.cuda or torch.version.hip
    return "torch.cuda.is_available() is False; " + (
        "no driver, or no GPU that it can use" if build else "this build of PyTorch is for the CPU only"
    )


def measure(*, smoke: bool = False) -> dict[str, Any]:
    """Launches, kernels and waits per step of whole loops; {"skipped": why} without a GPU.

    Two loops of different length are compared, so that what a loop does once (x_T, the copy of the result, the
    profiler's own wait) is not in the numbers.
    """
    reason = why_skipped()
    if reason is not None:
        return {"skipped": reason}
    name = "tiny" if smoke else "cifar10"
    case = Case("sampling", 16, networks.shape(name), name, _STEPS, device="cuda")
    rows = []
    for provider in sampling.BENCHMARK.providers:
        if provider.why_not(case) is None and provider.name in ("diffusers", "PyTorch", "fastddpm", "fastddpm, bf16"):
            short, long = (
                _profile(provider.build(dataclasses.replace(case, steps=n)).run) for n in (_STEPS, 2 * _STEPS)
            )
            rows.append(
                {
                    "who": provider.name,
                    "launches_per_step": (long.launches - short.launches) / _STEPS,
                    "kernels_per_step": (long.kernels - short.kernels) / _STEPS,
                    "syncs_per_step": (long.syncs - short.syncs) / _STEPS,
                }
            )
    return {"rows": rows}


def _profile(run: Callable[[], Any]) -> CudaCalls:
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
    return tally(profile.events() or ())
