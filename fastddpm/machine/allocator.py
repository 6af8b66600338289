"""Memory of a CPU that is freed and asked for again in every call of a network."""

from __future__ import annotations

import functools

import torch


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 31 MiB, instead of giving each back to the system.

    A network's activations are freed and allocated in every call, and the system clears each page that it gives again.
    Freeing one block of a size raises the limit below which glibc keeps them (mallopt(3), M_MMAP_THRESHOLD); other
    allocators take no notice.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")
