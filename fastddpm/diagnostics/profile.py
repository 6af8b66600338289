"""Where a sampling loop's time goes: named ranges around the network and the fused step, and what they add up to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from fastddpm.machine.torch_compile import named_kernels
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.step import StaticStep

SAMPLE, STEP, UNET, P_SAMPLE = "fastddpm::sample", "fastddpm::step", "fastddpm::unet", "fastddpm::p_sample"
# Our kernels' symbols, as ncu and nsys see them.
KERNELS = ("_p_sample_kernel", "_q_sample_kernel", "_randn_kernel")


class RangedSampler(Sampler):
    """A sampler that names the parts of its steps; with NVTX ranges too on CUDA."""

    @staticmethod
    def reverse_step(step: StaticStep) -> None:
        named = ranges(step.options.device)
        with named(STEP):
            with named(UNET):
                m = step.predict()
            with named(P_SAMPLE):
                step.update(m)
            step.next_row()
            step.paste()


def ranges(device: torch.device) -> Callable[[str], contextlib.AbstractContextManager[Any]]:
    """Return the function that opens a range on a device: name -> context manager."""
    return _on_cuda if device.type == "cuda" else record_function


@contextlib.contextmanager
def _on_cuda(name: str) -> Iterator[None]:
    with torch.cuda.nvtx.range(name), record_function(name):
        yield


@dataclass(frozen=True)
class Part:
    """One line of the breakdown: milliseconds on the host, and on the device where there is one."""

    name: str
    calls: int
    host_ms: float
    device_ms: float


@dataclass(frozen=True)
class Breakdown:
    """Where the time of a profile went.

    Attributes:
        steps: steps that ran.
        total, unet, p_sample: whole loop, network calls, fused steps.
        rest: what a step does beside these two (the counter, Python).
        gaps: what the loop does between its steps.
        operations: the longest operations by their own time, longest first.
    """

    steps: int
    total: Part
    unet: Part
    p_sample: Part
    rest: Part
    gaps: Part
    operations: tuple[Part, ...]


def breakdown(profiled: profile, top: int = 8) -> Breakdown:
    """Add up a profile's ranges.

    Raises:
        ValueError: the profile holds no sampling loop.
    """
    averages = profiled.key_averages()
    # On CUDA a range is there twice, as the host and as the device saw it; what the device did is added up in both.
    found = {event.key: event for event in averages if event.device_type == DeviceType.CPU}
    if SAMPLE not in found or STEP not in found:
        raise ValueError("the profile holds no sampling steps; were they replayed from a CUDA graph?")

    def part(name: str, label: str) -> Part:
        event = found[name]
        return Part(label, event.count, event.cpu_time_total / 1e3, event.device_time_total / 1e3)

    total, step = part(SAMPLE, "whole loop"), part(STEP, "step")
    unet, p_sample = part(UNET, "UNet"), part(P_SAMPLE, "fused step")
    own = [event for event in averages if event.key not in (SAMPLE, STEP, UNET, P_SAMPLE)]
    own.sort(key=lambda event: event.self_device_time_total or event.self_cpu_time_total, reverse=True)
    return Breakdown(
        steps=step.calls,
        total=total,
        unet=unet,
        p_sample=p_sample,
        rest=_less("rest of a step", step, unet, p_sample),
        gaps=_less("between steps", total, step),
        operations=tuple(
            Part(e.key, e.count, e.self_cpu_time_total / 1e3, e.self_device_time_total / 1e3) for e in own[:top]
        ),
    )


def _less(label: str, whole: Part, *parts: Part) -> Part:
    host = whole.host_ms - sum(p.host_ms for p in parts)
    device = whole.device_ms - sum(p.device_ms for p in parts)
    return Part(label, whole.calls, max(0.0, host), max(0.0, device))


def run_profile(sampler: RangedSampler, call: Mapping[str, Any], *, traced: bool = True) -> profile | None:
    """Warm a sampler up, and profile one loop.

    Args:
        sampler: one that was not called before, so that its compiled kernels get names.
        call: arguments of `Sampler.sample`.
        traced: record with torch.profiler; False leaves only ranges, for nsys and ncu, which allow no second profiler.

    Returns:
        The profile, None if not traced.
    """
    device, cuda = sampler.device, sampler.device.type == "cuda"
    recorder: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if traced:
        recorder = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
    elif cuda:
        # Between cudaProfilerStart and Stop, which nsys waits for.
        recorder = torch.cuda.profiler.profile()
    with named_kernels():
        sampler.sample(**call)
        if cuda:
            torch.cuda.synchronize(device)
        with recorder as profiled, ranges(device)(SAMPLE):
            sampler.sample(**call)
            if cuda:
                torch.cuda.synchronize(device)
    return profiled if traced else None


def nsight_commands(command: str) -> dict[str, str]:
    """Return command lines that show the loop in Nsight Systems and single our kernels out in Nsight Compute.

    Args:
        command: the `fastddpm profile` line to run under them, without --ranges-only.
    """
    pattern = "regex:" + "|".join(KERNELS)
    return {
        "nsys": "nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi --capture-range-end=stop "
        f"--output=fastddpm-timeline {command} --ranges-only",
        "ncu": f"ncu --kernel-name '{pattern}' --launch-skip 5 --launch-count 3 --set full --import-source yes "
        f"--export fastddpm-kernels {command} --ranges-only",
    }
