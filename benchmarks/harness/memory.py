"""Memory of this process: what it holds, and the most that it held since a reset. Linux only."""

from __future__ import annotations

from pathlib import Path

_MB = 1e6


def resident_mb() -> float | None:
    """Resident memory in MB; None where the system does not say."""
    return _status("VmRSS")


def reset_peak() -> bool:
    """Start counting the peak anew; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_mb() -> float | None:
    """The most resident memory since `reset_peak`, in MB; None where the system does not say."""
    return _status("VmHWM")


def _status(field: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), None)
    return None if kib is None else int(kib) * 1024 / _MB
