"""What a measurement depends on besides the code: processor, threads, versions, devices, allocator, load.

Behind ``fastddpm env``; every report of ``fastddpm bench`` carries it.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastddpm.machine import hardware
from fastddpm.machine.torch_compile import (
    has_cpp_compiler,
    has_triton,
    inductor_cache,
    package_cache,
    triton_cache,
    why_not_triton,
)
from fastddpm.ops.operators import use_triton

_THREADS = ("OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "TORCH_NUM_THREADS")
_ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_COMPILERS = ("TRITON_", "TORCHINDUCTOR_", "TORCH_COMPILE", "CXX", "CUDA_VISIBLE_DEVICES")


def facts() -> dict[str, Any]:
    """Return everything below as plain types, ready for JSON."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": hardware.versions(),
        "cpu": hardware.cpu(),
        "threads": hardware.threads(),
        "memory_gib": hardware.memory_gib(),
        "load_average": hardware.load_average(),
        "environment": {
            "threads": environment(_THREADS),
            "allocator": environment(_ALLOCATOR),
            "compilers": environment(_COMPILERS),
        },
        "cuda": hardware.cuda(),
        "compiles": compiles(),
        "backends": backends(),
    }


def environment(prefixes: tuple[str, ...]) -> dict[str, str]:
    """Variables whose name begins with one of the prefixes."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(prefixes)}


def compiles() -> dict[str, Any]:
    """What torch.compile and Triton need: a C++ compiler, caches that can be written."""
    found = (triton_cache(), inductor_cache(), package_cache())
    return {
        "cpp_compiler": has_cpp_compiler(),
        "triton": has_triton(),
        "caches": {
            cache.variable: {
                "path": str(cache.path),
                "writable": cache.writable,
                "others_can_write": None if cache.open_part is None else str(cache.open_part),
            }
            for cache in found
        },
    }


def backends() -> list[dict[str, str]]:
    """For each device: the backend that "auto" takes for the fused operations, and why."""
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    return [_backend(torch.device(name)) for name in names]


def _backend(device: torch.device) -> dict[str, str]:
    chosen = "triton" if use_triton("auto", device) else "torch"
    reason = why_not_triton(device)
    if chosen == "torch" and reason is None:
        reason = "Triton could only interpret here; backend='triton' does"
    return {"device": str(device), "auto": chosen, "why": reason or "the Triton kernels run on this device"}


def summary(facts: Mapping[str, Any]) -> str:
    """One line that names the machine under a number: processor or GPU, cores, versions of torch and Triton."""
    cpu, known = facts["cpu"], facts["versions"]
    parts = [f"{cpu['model']}, {cpu['usable_cores']} cores, {facts['threads']['intra_op']} threads"]
    parts += [_gpu(device) for device in facts["cuda"]["devices"]]
    if facts["cuda"].get("tf32_convolutions"):
        parts.append("float32 convolutions in TF32")
    parts.append(f"Python {facts['python']}, torch {known['torch']}, Triton {known['triton'] or 'not installed'}")
    return "; ".join(parts)


def _gpu(device: Mapping[str, Any]) -> str:
    """Its name, and where nvidia-ml-py is installed the clock that it ran at and may run at."""
    if "sm_clock_mhz" not in device:
        return device["name"]
    return f"{device['name']} at {device['sm_clock_mhz']} of {device['max_sm_clock_mhz']} MHz"


def executable() -> str:
    """The Python that runs this, for command lines that a reader may copy."""
    return Path(sys.executable).name or "python"
