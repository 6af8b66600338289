"""Arrays from .npy and .npz files that nobody vouches for.

They are read without pickle, and only after the size declared in their headers has been checked.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from fastddpm.checks import printable
from fastddpm.files.outside import regular_size

MAX_DATA_BYTES = 8 << 30
# What NumPy and zipfile raise on damaged, encrypted or exotic files.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, OverflowError, RuntimeError, SyntaxError, ValueError)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read images, and what belongs to them, from a .npz file, or the one array of a .npy file.

    Returns:
        ``images`` (or ``arr_0``, or the only one), and ``labels`` (or ``arr_1``) and ``condition`` where there are any:
        of whatever shape and values.

    Raises:
        ValueError: it is no regular file, damaged, holds objects or declares too much.
    """
    return _read(path, {"images": ("images", "arr_0"), "labels": ("labels", "arr_1"), "condition": ("condition",)})


def read_named(path: Path, name: str) -> np.ndarray:
    """Read one array from a .npz file, by its name or because it is the only one; or that of a .npy file.

    Raises:
        ValueError: it is no regular file, damaged, holds objects, declares too much, or has no such array.
    """
    return _read(path, {name: (name,)})[name]


def check_bytes(name: str, n_bytes: int) -> None:
    """Refuse what would not fit into memory, and name it."""
    if n_bytes > MAX_DATA_BYTES:
        raise ValueError(
            f"{name}: needs {n_bytes} bytes in memory, more than {MAX_DATA_BYTES}; use fewer or smaller images"
        )


def _read(path: Path, names: Mapping[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """Read arrays by any of their names; a file's only array is the first, which must be there."""
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


def _read_array(stream: IO[bytes], size: int, name: str) -> np.ndarray:
    """Read one .npy stream of ``size`` bytes after comparing that size with what its header declares."""
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(
        version
    )
    if read_header is None:
        raise ValueError(f"{name}: .npy version {version} is not supported")
    shape, fortran_order, dtype = read_header(stream)
    if dtype.hasobject or dtype.kind not in "uif":
        raise ValueError(f"{name}: holds {dtype}, not numbers")
    declared = math.prod(shape) * dtype.itemsize
    check_bytes(name, declared)
    if stream.tell() + declared != size:
        raise ValueError(f"{name}: declares {declared} bytes of data but holds {size - stream.tell()}")
    array = np.frombuffer(stream.read(declared), dtype=dtype)
    return array.reshape(shape[::-1]).T if fortran_order else array.reshape(shape)
