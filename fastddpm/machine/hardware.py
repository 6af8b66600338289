"""What this machine has: processor, threads, memory, load, versions of packages, CUDA devices and their clocks."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = (
    *("fastddpm", "torch", "triton", "numpy", "safetensors"),
    *("diffusers", "denoising-diffusion-pytorch", "openvino", "pytest-benchmark"),
)
# What decides which instructions torch, oneDNN and OpenVINO choose on x86 and Arm.
CPU_FLAGS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("sve", "bf16"),
)
_GIB = 1 << 30


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


def instruction_set() -> str:
    """Name the instructions that code compiled for this processor may use: what matters, and a hash of everything."""
    info, known = _cpuinfo(), cpu()
    flags = info.get("flags", info.get("Features", platform.processor()))
    digest = hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:8]
    return " ".join([known["architecture"], *known["flags"], f"({digest})"])


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
