"""Global memory with a shadow: every access is checked, every byte counted.

A segment is the exact extent of one tensor, so a canary margin is not needed: whatever lies outside a segment cannot
be touched. The shadow keeps, per unit (the element size, four bytes at most), whether the unit may be read, how often
it was written, and which thread read or wrote it last, which is what finds a race between threads.
"""

from __future__ import annotations

import ctypes
import mmap
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

_LINE = 16
_LARGE = 1 << 28
_MAP_NORESERVE = 0x4000  # mman.h of Linux; the mmap module does not name it
_SEVERAL = -1


class AccessError(Exception):
    """An access that a correct kernel never makes."""


def sparse_zeros(count: int, dtype: type[np.generic]) -> np.ndarray:
    """Zeros whose pages exist only once they are touched, even where the total exceeds the machine's memory."""
    size = count * np.dtype(dtype).itemsize
    if size < _LARGE:
        return np.zeros(count, dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype, count=count)


@dataclass
class Traffic:
    """Bytes moved, and how many accesses of each width (in bytes) moved them."""

    loaded: int = 0
    stored: int = 0
    load_widths: Counter[int] = field(default_factory=Counter)
    store_widths: Counter[int] = field(default_factory=Counter)

    def add(self, other: Traffic) -> None:
        self.loaded += other.loaded
        self.stored += other.stored
        self.load_widths += other.load_widths
        self.store_widths += other.store_widths


class Segment:
    """Bytes ``[start, start + size)`` of the host's memory, seen by the kernel as global memory."""

    def __init__(self, name: str, start: int, size: int, *, unit: int = 4, writable: bool = False) -> None:
        self.name, self.start, self.end = name, start, start + size
        self.unit, self.writable = unit, writable
        self.traffic = Traffic()
        units = -(-size // unit)
        # Where every default is zero, a shadow of a huge tensor costs only the pages that are touched.
        self.unreadable = sparse_zeros(units, np.bool_)
        self.writes = sparse_zeros(units if writable else 0, np.uint8)
        self._reader = sparse_zeros(units if writable else 0, np.int64)
        self._writer = sparse_zeros(units if writable else 0, np.int64)
        # The view starts and ends on a 16-byte line, so that a tensor at an odd offset has views of every width.
        self._view_start = start - start % _LINE
        length = -(-(self.end - self._view_start) // _LINE) * _LINE
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(self._view_start))

    def joined(self, other: Segment) -> Segment:
        """One read-only segment over both: readable where either is."""
        start, end = min(self.start, other.start), max(self.end, other.end)
        union = Segment(self.name, start, end - start, unit=min(self.unit, other.unit))
        union.unreadable[:] = True
        for part in (self, other):
            first = (part.start - start) // union.unit
            readable = np.repeat(~part.unreadable, part.unit // union.unit)
            union.unreadable[first : first + readable.size] &= ~readable
            union.traffic.add(part.traffic)
        return union

    def load(self, addresses: np.ndarray, width: int, count: int, threads: np.ndarray) -> list[np.ndarray]:
        """Read ``count`` values of ``width`` bytes at each address."""
        units = self._units(addresses, width * count)
        if self.unreadable[units].any():
            raise AccessError(f"{self.name}: read of memory that was never written")
        if self.writable:
            self._note_read(units, threads)
        self.traffic.loaded += addresses.size * width * count
        self.traffic.load_widths[width * count] += addresses.size
        view = self._bytes.view(f"u{width}")
        first = (addresses - np.uint64(self._view_start)) // np.uint64(width)
        return [view[first + np.uint64(i)] for i in range(count)]

    def store(self, addresses: np.ndarray, width: int, values: list[np.ndarray], threads: np.ndarray) -> None:
        """Write ``values[i]`` at ``addresses + i * width``."""
        if not self.writable:
            raise AccessError(f"{self.name}: write to an input")
        units = self._units(addresses, width * len(values))
        self._note_write(units, threads)
        self.unreadable[units] = False
        self.traffic.stored += addresses.size * width * len(values)
        self.traffic.store_widths[width * len(values)] += addresses.size
        view = self._bytes.view(f"u{width}")
        first = (addresses - np.uint64(self._view_start)) // np.uint64(width)
        for i, value in enumerate(values):
            view[first + np.uint64(i)] = value

    def _units(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Indices of the units that each access touches, [accesses, units each]."""
        if size % self.unit:
            raise AccessError(f"{self.name}: access of {size} bytes to elements of {self.unit}")
        first = (addresses - np.uint64(self.start)).astype(np.int64) // self.unit
        return first[:, None] + np.arange(size // self.unit)

    def _note_read(self, units: np.ndarray, threads: np.ndarray) -> None:
        threads = np.broadcast_to(threads[:, None] + 1, units.shape)
        writer = self._writer[units]
        if ((writer != 0) & (writer != threads)).any():
            raise AccessError(f"{self.name}: race, a thread reads what another one writes")
        before = self._reader[units]
        self._reader[units] = np.where((before == 0) | (before == threads), threads, _SEVERAL)
        clash = (self._reader[units] != threads) & (self._reader[units] != _SEVERAL)
        self._reader[units[clash]] = _SEVERAL

    def _note_write(self, units: np.ndarray, threads: np.ndarray) -> None:
        threads = np.broadcast_to(threads[:, None] + 1, units.shape)
        reader, writer = self._reader[units], self._writer[units]
        if ((reader != 0) & (reader != threads)).any():
            raise AccessError(f"{self.name}: race, a thread writes what another one reads")
        self._writer[units] = threads
        if ((writer != 0) & (writer != threads)).any() or (self._writer[units] != threads).any():
            raise AccessError(f"{self.name}: race, two threads write the same element")
        self.writes[units] += 1

    def end_launch(self) -> None:
        """Forget which thread touched what: launches on one stream are ordered."""
        self._reader = sparse_zeros(self._reader.size, np.int64)
        self._writer = sparse_zeros(self._writer.size, np.int64)


class Memory:
    """The segments that a kernel may touch."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def add(self, segment: Segment) -> Segment:
        """Register a segment; one that overlaps read-only ones is joined with them, any other overlap is refused."""
        for other in [s for s in self.segments if segment.start < s.end and s.start < segment.end]:
            if segment.writable or other.writable:
                raise AccessError(f"{segment.name} overlaps {other.name}, and one of them is written")
            self.segments.remove(other)
            segment = segment.joined(other)
        self.segments.append(segment)
        self.segments.sort(key=lambda s: s.start)
        return segment

    def find(self, start: int, end: int) -> Segment | None:
        """The segment that holds ``[start, end)``."""
        return next((s for s in self.segments if s.start <= start and end <= s.end), None)

    def load(self, addresses: np.ndarray, width: int, count: int, threads: np.ndarray) -> list[np.ndarray]:
        """Read ``count`` unsigned values of ``width`` bytes per address ([lanes], uint64)."""
        parts = self._split(addresses, width * count)
        if len(parts) == 1:
            return parts[0][0].load(addresses, width, count, threads)
        values = [np.zeros(addresses.shape, f"u{width}") for _ in range(count)]
        for segment, lanes in parts:
            for value, loaded in zip(values, segment.load(addresses[lanes], width, count, threads[lanes]), strict=True):
                value[lanes] = loaded
        return values

    def store(self, addresses: np.ndarray, width: int, values: list[np.ndarray], threads: np.ndarray) -> None:
        """Write unsigned values of ``width`` bytes per address."""
        for segment, lanes in self._split(addresses, width * len(values)):
            segment.store(addresses[lanes], width, [value[lanes] for value in values], threads[lanes])

    def _split(self, addresses: np.ndarray, size: int) -> list[tuple[Segment, np.ndarray | slice]]:
        """Check alignment and bounds, and group the lanes by segment."""
        odd = addresses % np.uint64(size) != 0
        if odd.any():
            raise AccessError(f"unaligned access of {size} bytes at {hex(int(addresses[odd][0]))}")
        low, high = int(addresses.min()), int(addresses.max()) + size
        whole = self.find(low, high)
        if whole is not None:
            return [(whole, slice(None))]
        starts = np.array([s.start for s in self.segments], np.uint64)
        owners = np.searchsorted(starts, addresses, side="right") - 1
        parts: list[tuple[Segment, np.ndarray | slice]] = []
        for index in np.unique(owners):
            lanes = np.flatnonzero(owners == index)
            self._check_bounds(int(index), addresses[lanes], size)
            parts.append((self.segments[index], lanes))
        return parts

    def _check_bounds(self, index: int, addresses: np.ndarray, size: int) -> None:
        if index < 0 or int(addresses.max()) + size > self.segments[index].end:
            name = self.segments[index].name if index >= 0 else "everything"
            past = int(addresses.max()) + size - (self.segments[index].end if index >= 0 else 0)
            raise AccessError(f"access out of bounds: {size} bytes, {past} bytes past the end of {name}")
