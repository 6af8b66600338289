"""Devices: named with their index, refused where they are not there, and made current."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def resolve_device(device: torch.device | str) -> torch.device:
    """Return the device with its index; "auto" is CUDA where it is available, else the CPU.

    Raises:
        ValueError: torch knows no such device, or it is not there.
        RuntimeError: CUDA was initialised before this process was forked.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        # torch's own message lists twenty kinds, most of them never seen.
        raise ValueError(f"unknown device {device!r}; choose cpu, cuda, or one of several: cuda:1") from error
    if device.type != "cuda":
        return device
    if torch.cuda._is_in_bad_fork():
        raise RuntimeError(
            "CUDA cannot be used in a process forked after CUDA was initialised; start workers with "
            "multiprocessing.get_context('spawn')"
        )
    count = torch.cuda.device_count()
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if count else 0
    if index >= count:
        raise ValueError(f"device cuda:{index} was asked for, and {count} CUDA devices are visible; use device='cpu'")
    return torch.device("cuda", index)


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Make networks in float32 on the CPU, whatever torch.set_default_dtype and torch.set_default_device ask for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a CUDA device current: Triton launches on whatever device is."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def synchronisation_raises() -> Iterator[None]:
    """Find a step that synchronises before its capture is begun.

    PyTorch cannot fully undo a capture that CUDA has invalidated: the default generator stays in capture mode, and
    torch.randn on the GPU raises from then on.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
