"""Global memory with a shadow: every access is checked, every byte counted.

A segment is the exact extent of one tensor, so a canary margin is not needed: whatever lies outside a segment cannot
be touched. The shadow keeps, per unit (the element size, four bytes at most), whether the unit may be read, whether it
was, how often it was written, and which thread read or wrote it last, which is what finds a race between threads.

A tensor that is updated in place is run twice. The first run learns which thread writes what; in the second, a value
that a thread reads from another thread's element is undefined, so it may be dropped but must not reach memory.
"""

from __future__ import annotations

import copy
import ctypes
import mmap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

_LINE = 16
_LARGE = 1 << 28
_MAP_NORESERVE = 0x4000  # mman.h of Linux; the mmap module does not name it
_SEVERAL = -1

Loaded = tuple[list[np.ndarray], np.ndarray | None]
"""Values as unsigned integers, and which accesses gave an undefined one; None if none did."""


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
    """Bytes requested, and how many accesses of each width (in bytes) requested them."""

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

    def __init__(
        self, name: str, start: int, size: int, *, unit: int = 4, writable: bool = False, in_place: bool = False
    ) -> None:
        self.name, self.start, self.end = name, start, start + size
        self.unit, self.writable, self.in_place = unit, writable, in_place
        self.traffic = Traffic()
        units = -(-size // unit)
        # Where every default is zero, a shadow of a huge tensor costs only the pages that are touched.
        self.unreadable = sparse_zeros(units, np.bool_)
        self.read = sparse_zeros(units, np.bool_)
        self.writes = sparse_zeros(units if writable else 0, np.uint8)
        self._reader = sparse_zeros(units if writable else 0, np.int64)
        self._writer = sparse_zeros(units if writable else 0, np.int64)
        self._owner: np.ndarray | None = None
        # The view starts and ends on a 16-byte line, so that a tensor at an odd offset has views of every width.
        self._view_start = start - start % _LINE
        length = -(-(self.end - self._view_start) // _LINE) * _LINE
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(self._view_start))

    def contents(self) -> np.ndarray:
        """The segment's own bytes."""
        first = self.start - self._view_start
        return self._bytes[first : first + self.end - self.start]

    @property
    def distinct_loaded(self) -> int:
        """Bytes that were read at least once: what DRAM delivers where a cache serves the repeats."""
        return int(self.read.sum()) * self.unit

    def joined(self, other: Segment) -> Segment:
        """One read-only segment over both: readable where either is."""
        start, end = min(self.start, other.start), max(self.end, other.end)
        union = Segment(self.name, start, end - start, unit=min(self.unit, other.unit))
        union.unreadable[:] = True
        for part in (self, other):
            first = (part.start - start) // union.unit
            readable = np.repeat(~part.unreadable, part.unit // union.unit)
            union.unreadable[first : first + readable.size] &= ~readable
            union.read[first : first + readable.size] |= np.repeat(part.read, part.unit // union.unit)
            union.traffic.add(part.traffic)
        return union

    def load(self, addresses: np.ndarray, width: int, count: int, threads: np.ndarray) -> Loaded:
        """Read ``count`` values of ``width`` bytes at each address, and tell which of them are undefined."""
        units = self._units(addresses, width * count)
        if self.unreadable[units].any():
            raise AccessError(f"{self.name}: read of memory that was never written")
        undefined = self._note_read(units, threads) if self.writable else None
        self.read[units] = True
        self.traffic.loaded += addresses.size * width * count
        self.traffic.load_widths[width * count] += addresses.size
        view = self._bytes.view(f"u{width}")
        first = (addresses - np.uint64(self._view_start)) // np.uint64(width)
        return [view[first + np.uint64(i)] for i in range(count)], undefined

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

    def _note_read(self, units: np.ndarray, threads: np.ndarray) -> np.ndarray | None:
        threads = np.broadcast_to(threads[:, None] + 1, units.shape)
        if self.in_place:
            owner = threads if self._owner is None else self._owner[units]
            foreign = ((owner != 0) & (owner != threads)).any(axis=1)
            return foreign if foreign.any() else None
        writer = self._writer[units]
        if ((writer != 0) & (writer != threads)).any():
            raise AccessError(f"{self.name}: race, a thread reads what another one writes")
        before = self._reader[units]
        self._reader[units] = np.where((before == 0) | (before == threads), threads, _SEVERAL)
        clash = (self._reader[units] != threads) & (self._reader[units] != _SEVERAL)
        self._reader[units[clash]] = _SEVERAL
        return None

    def _note_write(self, units: np.ndarray, threads: np.ndarray) -> None:
        threads = np.broadcast_to(threads[:, None] + 1, units.shape)
        reader, writer = self._reader[units], self._writer[units]
        if ((reader != 0) & (reader != threads)).any():
            raise AccessError(f"{self.name}: race, a thread writes what another one reads")
        self._writer[units] = threads
        if ((writer != 0) & (writer != threads)).any() or (self._writer[units] != threads).any():
            raise AccessError(f"{self.name}: race, two threads write the same element")
        self.writes[units] += 1

    def end_rehearsal(self) -> None:
        """Keep who wrote what for the second run."""
        self._owner = self._writer
        self._writer = sparse_zeros(self._writer.size, np.int64)

    def end_launch(self) -> None:
        """Forget which thread touched what: launches on one stream are ordered."""
        self._owner = None
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

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Run something that leaves no trace but who wrote what in the tensors that are updated in place."""
        written = [segment for segment in self.segments if segment.writable]
        if any(segment.end - segment.start >= _LARGE for segment in written):
            raise AccessError("an in-place update of a huge tensor is not rehearsed here; copy a part of it")
        contents = [segment.contents().copy() for segment in written]
        shadows = [copy.deepcopy((s.traffic, s.read, s.unreadable, s.writes)) for s in self.segments]
        yield
        for segment, shadow in zip(self.segments, shadows, strict=True):
            segment.traffic, segment.read, segment.unreadable, segment.writes = shadow
        for segment, content in zip(written, contents, strict=True):
            segment.contents()[:] = content
            segment.end_rehearsal()

    def find(self, start: int, end: int) -> Segment | None:
        """The segment that holds ``[start, end)``."""
        return next((s for s in self.segments if s.start <= start and end <= s.end), None)

    def load(self, addresses: np.ndarray, width: int, count: int, threads: np.ndarray) -> Loaded:
        """Read ``count`` unsigned values of ``width`` bytes per address ([lanes], uint64)."""
        parts = self._split(addresses, width * count)
        if len(parts) == 1:
            return parts[0][0].load(addresses, width, count, threads)
        values = [np.zeros(addresses.shape, f"u{width}") for _ in range(count)]
        undefined = np.zeros(addresses.shape, np.bool_)
        for segment, lanes in parts:
            loaded, marks = segment.load(addresses[lanes], width, count, threads[lanes])
            undefined[lanes] = False if marks is None else marks
            for value, part in zip(values, loaded, strict=True):
                value[lanes] = part
        return values, undefined if undefined.any() else None

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
