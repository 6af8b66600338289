"""A sampler's options, checked and resolved."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence

import torch

from fastddpm.machine import hardware

logger = logging.getLogger("fastddpm")

NETWORK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return one sample's shape as a tuple.

    Raises:
        ValueError: it is empty, or has a size that is no positive integer.
    """
    sizes = tuple(shape)
    if not sizes or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sizes):
        raise ValueError(f"shape must be one sample's shape, (C, H, W) or (D,), of positive integers; got {shape!r}")
    return sizes


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the network's dtype.

    Raises:
        ValueError: the network cannot run in it; the state is float32 in any case.
    """
    if dtype not in NETWORK_DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}; pass dtype=torch.float32")
    return dtype


def resolve_device(device: torch.device | str) -> torch.device:
    """Return the device with its index.

    Raises:
        ValueError: torch knows no such device, or it is not there.
        RuntimeError: CUDA was initialised before this process was forked.
    """
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


def decide_graph(choice: bool | str, device: torch.device) -> bool:
    """Resolve cuda_graph="auto": on CUDA.

    Raises:
        ValueError: choice is none of "auto", True, False, or True on another device.
    """
    if choice == "auto":
        return device.type == "cuda"
    if not isinstance(choice, bool):
        raise ValueError(f"cuda_graph must be 'auto', True or False, got {choice!r}")
    if choice and device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a CUDA device, got {device}; use cuda_graph='auto'")
    return choice


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a CUDA device current: Triton launches on whatever device is."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def note_emulation(dtype: torch.dtype, device: torch.device) -> None:
    """Say once where bfloat16 is asked of what emulates it: a CPU without it, a GPU before compute capability 8.0."""
    if dtype != torch.bfloat16 or torch.version.hip is not None:
        return
    if device.type == "cpu":
        processor = hardware.cpu()
        if processor["flags"] and not processor["native_bfloat16"]:
            logger.warning("this processor emulates bfloat16, slowly: use dtype=torch.float32")
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        logger.warning(
            "%s has compute capability %d.%d, which emulates bfloat16, slowly: use dtype=torch.float16",
            device,
            major,
            minor,
        )
