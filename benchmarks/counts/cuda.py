"""What a sampling loop asks of a GPU and of the host, per step, from torch.profiler's record of CUDA calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from fastddpm.benchmarks import bench_sampling as sampling
from fastddpm.benchmarks.harness.case import Case
from fastddpm.benchmarks.peers import networks

from fastddpm.machine import hardware as machine

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


class CudaCalls(NamedTuple):
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
    reason = machine.cuda()["reason"]
    return reason and f"torch.cuda.is_available() is False; {reason}"


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
            differences = zip(CudaCalls._fields, long, short, strict=True)
            rows.append({"who": provider.name, **{f"{name}_per_step": (b - a) / _STEPS for name, b, a in differences}})
    return {"rows": rows}


def _profile(run: Callable[[], Any]) -> CudaCalls:
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
    return tally(profile.events() or ())
