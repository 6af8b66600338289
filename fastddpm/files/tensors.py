"""Tensors from safetensors files that nobody vouches for: what the header claims is checked before memory is taken.

safetensors itself refuses truncated and overlapping files, but spends seconds on a header with 200,000 tensors, and
knows nothing of the network that the weights are for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastddpm.checks import printable, shown
from fastddpm.files.arrays import read_arrays
from fastddpm.files.outside import regular_size
from fastddpm.files.pickles import Storage, StoredTensor, are_sizes
from fastddpm.files.safejson import parse_object

# The largest networks of this family have some 1,500 tensors and headers of 200 kB, a training checkpoint five times
# as many.
MAX_HEADER_BYTES = 2 << 20
MAX_TENSORS = 10_000
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
_NAMES_SHOWN = 4


class TensorFile(Protocol):
    """A file of tensors, or several: what it holds is known before it is read."""

    @property
    def path(self) -> Path:
        """Where it is, for messages."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """What it holds, by name; dense tensors have a shape."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors as float32 copies on the CPU; ValueError where they cannot be."""


class SafetensorsFile:
    """A safetensors file whose header has been checked.

    Args:
        digest: its SHA-256 in hexadecimal, compared before the first tensor is read.

    Raises:
        ValueError: it is no regular file, or its header is too long, no JSON, has too many tensors, an unknown dtype, a
            shape that does not fit its bytes, or bytes outside the file.
    """

    def __init__(self, path: Path, digest: str | None = None) -> None:
        self.path = path
        self._digest = digest
        self.tensors, self.metadata = _read_header(path)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See `TensorFile`; refuses a file with another digest or damage, and what is not floating point."""
        names = list(names)
        for name in names:
            if not self.tensors[name].dtype.is_floating_point:
                raise ValueError(f"{self.path}: {shown(name)} is {self.tensors[name].dtype}, not floating point")
        if self._digest is not None and sha256(self.path) != self._digest:
            raise ValueError(
                f"{self.path}: its SHA-256 is not weights_sha256={self._digest}; it is damaged or not its own"
            )
        try:
            with safe_open(self.path, framework="pt") as file:
                return {name: file.get_tensor(name).to(torch.float32, copy=True) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{self.path}: {error}") from error


class LoadedTensors:
    """Tensors in memory, made from those of a file."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        self.tensors = tensors

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See `TensorFile`."""
        return {name: self.tensors[name].to(torch.float32) for name in names}


class Shards:
    """The tensors of several files as those of one.

    Raises:
        ValueError: two files hold a tensor of the same name.
    """

    def __init__(self, path: Path, files: Sequence[TensorFile]) -> None:
        self.path, self._files = path, files
        self.tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
        if len(self.tensors) < sum(len(file.tensors) for file in files):
            raise ValueError(f"{path}: two of its {len(files)} files hold a tensor of the same name")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See `TensorFile`."""
        wanted = set(names)
        read: dict[str, Tensor] = {}
        for file in self._files:
            read |= file.read(wanted & file.tensors.keys())
        return read


def read_tensors(
    file: TensorFile, expected: Mapping[str, torch.Size], places: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Read exactly the tensors that a network has.

    Args:
        expected: shape by the network's own names.
        places: from those names to the file's; default: they are the same.

    Returns:
        float32 tensors on the CPU, by the names of `expected`; copies, so the file may change afterwards.

    Raises:
        ValueError: tensors missing, left over or of another shape than expected, or that cannot be read; a value that
            is NaN or infinite.
    """
    places = {name: name for name in file.tensors} if places is None else places
    _check_match(
        file.path, {name: getattr(file.tensors[place], "shape", None) for name, place in places.items()}, expected
    )
    tensors = file.read(places.values())
    for name, place in places.items():
        if not tensors[place].isfinite().all():
            raise ValueError(
                f"{file.path}: {name} holds NaN or infinity: the file is damaged, or its training diverged"
            )
    return {name: tensors[place] for name, place in places.items()}


def read_numbers(path: Path, name: str) -> Tensor:
    """Read the numbers called ``name``, or the only ones, from a .npy, .npz or .safetensors file.

    Returns:
        float32 on the CPU.

    Raises:
        ValueError: it is damaged, has no such numbers, or one that is NaN or infinite.
    """
    if path.suffix == ".safetensors":
        file = SafetensorsFile(path)
        found = next(iter(file.tensors)) if len(file.tensors) == 1 else name
        if found not in file.tensors:
            raise ValueError(f"{path}: no tensor called {name} among {list(map(shown, file.tensors))[:8]}")
        numbers = file.read([found])[found]
    else:
        numbers = torch.from_numpy(read_arrays(path, {name: (name,)})[name].astype(np.float32))
    if not numbers.isfinite().all():
        raise ValueError(f"{path}: {name} holds NaN or infinity")
    return numbers


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def refuse_escape(path: Path, folder: Path) -> None:
    """Refuse a file that a symbolic link takes out of its folder.

    The Hugging Face cache, whose snapshots link to the blobs of the same repository, is let through.

    Raises:
        ValueError: the link's target lies elsewhere.
    """
    target, home = path.resolve(), folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise ValueError(printable(f"{path}: links to {target}, outside {home}; copy the file into the folder"))


def _read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    size = regular_size(path)
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path}: truncated, or no safetensors file ({size} bytes, a header of {length} announced)"
            )
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path}: a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
        header = parse_object(stream.read(length), source=f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: its metadata are no strings")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{path}: {len(header)} tensors; at most {MAX_TENSORS} are read")
    tensors = {name: _checked_entry(path, name, entry, size - 8 - length) for name, entry in header.items()}
    return tensors, metadata


def _checked_entry(path: Path, name: str, entry: Any, data_bytes: int) -> StoredTensor:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: its header entry needs dtype, shape and data_offsets, and nothing else")
    shape, offsets = entry["shape"], entry["data_offsets"]
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{where}: dtype {shown(dtype)} is not one of {', '.join(_DTYPES)}")
    if not are_sizes(shape, list) or len(shape) > 8 or not are_sizes(offsets, list) or len(offsets) != 2:
        raise ValueError(f"{where}: shape {shown(shape)} or data_offsets {shown(offsets)} is no list of sizes")
    begin, end = offsets
    count = math.prod(shape)
    if count * _DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"{where}: shape {shape} in {dtype} needs other than bytes {begin} to {end}")
    if end > data_bytes:
        raise ValueError(
            f"{where}: bytes {begin} to {end} lie outside the file's {data_bytes} bytes of data; truncated?"
        )
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return StoredTensor(Storage(_DTYPES[dtype], name, count), 0, tuple(shape), stride, _DTYPES[dtype])


def _check_match(path: Path, found: Mapping[str, Any], expected: Mapping[str, torch.Size]) -> None:
    missing = [shown(name) for name in expected if name not in found]
    unexpected = [shown(name) for name in found if name not in expected]
    mismatched = [
        f"{shown(name)} is {list(found[name] or ['no dense tensor'])} where the configuration needs {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != tuple(shape)
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:_NAMES_SHOWN])}{', ...' if len(names) > _NAMES_SHOWN else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
        if names
    ]
    if problems:
        raise ValueError(f"{path}: weights of another architecture: {'; '.join(problems)}")
