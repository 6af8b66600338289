"""A step's timestep as the host knows it, found without reading from a device."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def on_host(timestep: Any, listed: Tensor, visited: Callable[[], Sequence[int]]) -> int | None:
    """Return a step's timestep as a Python int, or None where only the accelerator knows it.

    Args:
        timestep: what the caller gave, an int or a tensor of one integer.
        listed: the scheduler's `timesteps`.
        visited: returns the same as Python numbers.

    Raises:
        IndexError: it is no integer.
        RuntimeError: it holds more than one timestep.
    """
    if not isinstance(timestep, Tensor):
        # operator.index would make a constant of the symbolic int that a compiled step is given.
        return timestep if isinstance(timestep, int) else _as_int(timestep)
    if timestep.numel() != 1:
        raise RuntimeError(f"timestep must hold one value, got shape {list(timestep.shape)}; step takes one t")
    if timestep.is_floating_point() or timestep.is_complex():
        raise IndexError(f"timestep must be an integer, got {timestep.dtype}; it is an index into the schedule")
    if torch.compiler.is_compiling():
        return None
    if timestep.device.type == "cpu":
        return int(timestep)
    # `for t in scheduler.timesteps` yields views, whose place in the list the host knows.
    if timestep.device != listed.device or timestep.dtype != listed.dtype:
        return None
    if timestep.untyped_storage()._cdata != listed.untyped_storage()._cdata:
        return None
    distance = int(timestep.storage_offset()) - int(listed.storage_offset())
    position, remainder = divmod(distance, listed.stride(0) or 1)
    return visited()[position] if remainder == 0 and 0 <= position < len(visited()) else None


def check_on_host(timesteps: Tensor, T: int) -> None:
    """Raise IndexError unless timesteps [B] are integers, and in 0..T-1 as far as that is known on the host."""
    if timesteps.is_floating_point() or timesteps.is_complex():
        raise IndexError(f"timesteps must be integers, got {timesteps.dtype}; they are indices into the schedule")
    if timesteps.device.type != "cpu" or torch.compiler.is_compiling() or timesteps.numel() == 0:
        return
    low, high = int(timesteps.min()), int(timesteps.max())
    if low < 0 or high >= T:
        raise IndexError(f"timesteps must lie in 0..{T - 1}, got {low if low < 0 else high}")


def safe_index(timesteps: Tensor, T: int, device: torch.device) -> Tensor:
    """Return int64 indices [n] on `device`; those out of range become T, whose row is NaN."""
    t = timesteps.to(device=device, dtype=torch.int64)
    return t.where((t >= 0) & (t < T), T)


def _as_int(timestep: Any) -> int:
    try:
        return operator.index(timestep)
    except TypeError:
        raise IndexError(f"timestep must be an integer or a tensor of one, got {timestep!r}") from None
