"""Memory of a CPU that the system would give back too early, in every call of a network, or too late."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# madvise(2), Linux 5.4; an older one refuses it, and nothing is lost.
_MADV_PAGEOUT = 21


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 31 MiB, instead of giving each back to the system.

    A network's activations are freed and allocated in every call, and the system clears each page that it gives again.
    Freeing one block of a size raises the limit below which glibc keeps them (mallopt(3), M_MMAP_THRESHOLD); other
    allocators take no notice.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


@contextlib.contextmanager
def memory_given_back() -> Iterator[None]:
    """At the end give Linux back what is not needed again soon: files that were mapped inside, and freed blocks.

    What is read of the files later, the system reads again.
    """
    before = _constants_of_files()
    yield
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for start, end in _constants_of_files() - before:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def _constants_of_files() -> set[tuple[int, int]]:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return set()
    fields = [line.split(maxsplit=5) for line in lines]
    ranges = [place for place, access, _, _, inode, *_ in fields if access == "r--p" and inode != "0"]
    return {(int(start, 16), int(end, 16)) for start, end in (place.split("-") for place in ranges)}
