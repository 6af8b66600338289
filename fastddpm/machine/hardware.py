"""What a measurement depends on besides the code: processor, threads, versions, devices, allocator, load.

Behind ``fastddpm env``; every report of ``fastddpm bench`` carries it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = (
    "fastddpm",
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "diffusers",
    "denoising-diffusion-pytorch",
    "openvino",
    "pytest-benchmark",
)
# What decides which instructions torch, oneDNN and OpenVINO choose on x86 and Arm.
CPU_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "sve",
    "bf16",
)
_THREADS = ("OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "TORCH_NUM_THREADS")
_ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_COMPILERS = ("TRITON_", "TORCHINDUCTOR_", "TORCH_COMPILE", "CXX", "CUDA_VISIBLE_DEVICES")
_GIB = 1 << 30


def facts() -> dict[str, Any]:
    """Return everything below as plain types, ready for JSON."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions(),
        "cpu": cpu(),
        "threads": threads(),
        "memory_gib": memory_gib(),
        "load_average": load_average(),
        "environment": {
            "threads": environment(_THREADS),
            "allocator": environment(_ALLOCATOR),
            "compilers": environment(_COMPILERS),
        },
        "cuda": cuda(),
        "compiles": compiles(),
        "backends": backends(),
    }


def versions() -> dict[str, str | None]:
    """Version of each package that matters; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    # The distribution's version has no "+cpu" or "+cu130", and a checkout on sys.path has no distribution.
    for name in ("torch", "fastddpm"):
        with contextlib.suppress(ImportError):
            found[name] = str(importlib.import_module(name).__version__)
    return found


def cpu() -> dict[str, Any]:
    """Model, cores, flags that matter, quota of the container, frequency governor."""
    info = _cpuinfo()
    present = set(info.get("flags", info.get("Features", "")).split())
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "quota_cores": _cgroup_quota(),
        "flags": [flag for flag in CPU_FLAGS if flag in present],
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "native_bfloat16": bool(present & {"avx512_bf16", "amx_bf16", "bf16"}),
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo."""
    entries: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if not key.strip():
            break
        entries[key.strip()] = value.strip()
    return entries


def _cgroup_quota() -> float | None:
    """Cores that a container may use (cgroup v2); None without a limit."""
    quota, _, period = (_read("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    return None if quota == "max" else int(quota) / int(period)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def threads() -> dict[str, int]:
    """Threads that torch uses inside an operation, and between operations."""
    import torch

    return {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()}


def memory_gib() -> float | None:
    """Physical memory."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1)
    except (ValueError, OSError, AttributeError):
        return None


def load_average() -> list[float] | None:
    """Runnable processes over 1, 5 and 15 minutes; None where the system does not tell."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def environment(prefixes: tuple[str, ...]) -> dict[str, str]:
    """Variables whose name begins with one of the prefixes."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(prefixes)}


def cuda() -> dict[str, Any]:
    """CUDA or ROCm as torch sees it: the build, whether it works and why not, and each device."""
    import torch

    found: dict[str, Any] = {"build": torch.version.cuda or torch.version.hip, "available": torch.cuda.is_available()}
    if found["build"] is None:
        return {**found, "reason": "this build of PyTorch is for the CPU only", "devices": []}
    if not found["available"]:
        return {**found, "reason": "no driver, or no device that it can use", "devices": []}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "processors": properties.multi_processor_count,
                "memory_gib": round(properties.total_memory / _GIB, 1),
                "l2_mib": getattr(properties, "L2_cache_size", 0) / (1 << 20) or None,
                **clocks(index),
            }
        )
    return {**found, "reason": None, "devices": devices, "tf32_convolutions": torch.backends.cudnn.allow_tf32}


def clocks(index: int) -> dict[str, Any]:
    """Clocks, power limit and driver of a GPU from nvidia-ml-py; empty where that is not installed."""
    import torch

    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        # NVML numbers the GPUs of the machine, PyTorch those that the process may see.
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        return {
            "sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "max_sm_clock_mhz": nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
            "power_limit_w": nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
            "throttle_reasons": nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
            "driver": str(nvml.nvmlSystemGetDriverVersion()),
        }
    except Exception:
        # A missing package, an old driver, no permission: clocks are a remark, never a condition.
        return {}


def compiles() -> dict[str, Any]:
    """What torch.compile and Triton need: a C++ compiler, caches that can be written."""
    from fastddpm.machine import caches
    from fastddpm.sampling.compile_policy import has_cpp_compiler, has_triton

    found = (caches.triton(), caches.inductor())
    return {
        "cpp_compiler": has_cpp_compiler(),
        "triton": has_triton(),
        "caches": {
            cache.variable: {
                "path": str(cache.path),
                "writable": cache.writable,
                "others_can_write": cache.others_can_write,
            }
            for cache in found
        },
    }


def backends() -> list[dict[str, str]]:
    """For each device: the backend that "auto" takes for the fused operations, and why."""
    import torch

    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    return [_backend(torch.device(name)) for name in names]


def _backend(device: Any) -> dict[str, str]:
    from fastddpm.ops.backend import use_triton, why_not_triton

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
