"""Arrays from .npy and .npz files that nobody vouches for.

They are read without pickle, and only after the size declared in their headers has been checked.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from fastddpm.checks import printable
from fastddpm.files.outside import regular_size

MAX_DATA_BYTES = 8 << 30
# Images and what belongs to them.
IMAGES = {"images": ("images", "arr_0"), "labels": ("labels", "arr_1"), "condition": ("condition",)}
# What NumPy and zipfile raise on damaged, encrypted or exotic files.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, OverflowError, RuntimeError, SyntaxError, ValueError)


def read_arrays(path: Path, names: Mapping[str, Sequence[str]] = IMAGES) -> dict[str, np.ndarray]:
    """Read the arrays of a .npz file that are wanted, or the one of a .npy file.

    Args:
        names: what is wanted, each by the names that it may have in the file. The first must be there, or be the
            file's only array.

    Returns:
        What there is of it, of whatever shape and values.

    Raises:
        ValueError: it is no regular file, damaged, holds objects, declares too much, or lacks the first array.
    """
    size, first = regular_size(path), next(iter(names))
    try:
        if path.suffix != ".npz":
            with path.open("rb") as stream:
                return {first: _read_array(stream, size, first)}
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            found = {kind: name for kind, known in names.items() for name in reversed(known) if name in members}
            if len(members) == 1:
                found.setdefault(first, next(iter(members)))
            if first not in found:
                raise ValueError(f"no array called {' or '.join(names[first])} among {sorted(members)[:8]}")
            arrays = {}
            for kind, name in found.items():
                with archive.open(members[name]) as stream:
                    arrays[kind] = _read_array(stream, members[name].file_size, name)
            return arrays
    except _UNREADABLE as error:
        raise ValueError(printable(f"{path}: not a usable array file: {error}")) from error


def check_bytes(name: str, n_bytes: int) -> None:
    """Refuse what would not fit into memory, and name it."""
    if n_bytes > MAX_DATA_BYTES:
        raise ValueError(
            f"{name}: needs {n_bytes} bytes in memory, more than {MAX_DATA_BYTES}; use fewer or smaller images"
        )


def _read_array(stream: IO[bytes], size: int, name: str) -> np.ndarray:
    """Read one .npy stream of ``size`` bytes after comparing that size with what its header declares."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if (version := np.lib.format.read_magic(stream)) not in readers:
        raise ValueError(f"{name}: .npy version {version} is not supported")
    shape, fortran_order, dtype = readers[version](stream)
    if dtype.hasobject or dtype.kind not in "uif":
        raise ValueError(f"{name}: holds {dtype}, not numbers")
    declared = math.prod(shape) * dtype.itemsize
    check_bytes(name, declared)
    if stream.tell() + declared != size:
        raise ValueError(f"{name}: declares {declared} bytes of data but holds {size - stream.tell()}")
    array = np.frombuffer(stream.read(declared), dtype=dtype)
    return array.reshape(shape[::-1]).T if fortran_order else array.reshape(shape)
