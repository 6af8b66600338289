"""Memory of this process: what it holds, and the most that it held since a reset."""

from __future__ import annotations

import resource
from pathlib import Path

_MB = 1e6


def resident_mb() -> float:
    """Resident memory in MB."""
    return _status("VmRSS") or _high_water_mb()


def reset_peak() -> bool:
    """Start counting the peak anew; False where the system cannot (it then counts from the process's start)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_mb() -> float:
    """The most resident memory since `reset_peak`, in MB."""
    return _status("VmHWM") or _high_water_mb()


def _status(field: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), None)
    return None if kib is None else int(kib) * 1024 / _MB


def _high_water_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _MB
