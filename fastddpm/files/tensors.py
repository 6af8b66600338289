"""Tensors from safetensors files that nobody vouches for: what the header claims is checked before memory is taken.

safetensors itself refuses truncated and overlapping files, but spends seconds on a header with 200,000 tensors, and
knows nothing of the network that the weights are for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastddpm.files.outside import regular_size
from fastddpm.files.safejson import parse_object

# The largest networks of this family have some 1,500 tensors and headers of 200 kB.
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 5_000
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_NAMES_SHOWN = 4


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, from its header alone.

    Raises:
        ValueError: the header is too long, no JSON, has too many tensors, a dtype other than those of `ITEM_BYTES`, a
            shape that does not fit its bytes, or bytes outside the file.
    """
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
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{path}: {len(header)} tensors; at most {MAX_TENSORS} are read")
    return {name: _checked_shape(path, name, entry, size - 8 - length) for name, entry in header.items()}


def read_tensors(
    path: Path,
    expected: Mapping[str, torch.Size],
    rename: Callable[[str], str] = lambda name: name,
    digest: str | None = None,
) -> dict[str, Tensor]:
    """Read exactly the tensors that a network has, as float32.

    Args:
        path: a safetensors file.
        expected: shape by name.
        rename: from a name in the file to a name in `expected`.
        digest: SHA-256 of the file, compared where it is given.

    Returns:
        float32 tensors on the CPU, by the names of `expected`; copies, so the file may change afterwards.

    Raises:
        ValueError: see `read_shapes`; tensors missing, left over or of another shape than expected; another
            digest; a value that is NaN or infinite.
    """
    shapes = read_shapes(path)
    names = {rename(name): name for name in shapes}
    if len(names) < len(shapes):
        raise ValueError(f"{path}: two tensors stand for the same parameter under an old and a new name")
    _check_match(path, {new: shapes[old] for new, old in names.items()}, expected)
    if digest is not None and sha256(path) != digest:
        raise ValueError(f"{path}: its SHA-256 is not weights_sha256={digest}; it is damaged or not its own")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {new: file.get_tensor(old).to(torch.float32, copy=True) for new, old in names.items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity: the file is damaged, or its training diverged")
    return tensors


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
        raise ValueError(f"{path}: links to {target}, outside {home}; copy the file into the folder")


def _checked_shape(path: Path, name: str, entry: Any, data_bytes: int) -> tuple[int, ...]:
    where = f"{path}: tensor {name[:120]!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: its header entry needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{where}: dtype {repr(dtype)[:40]} is not one of {', '.join(ITEM_BYTES)}")
    if not _are_sizes(shape) or len(shape) > 8 or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{where}: shape {repr(shape)[:80]} or data_offsets {repr(offsets)[:80]} is no list of sizes")
    begin, end = offsets
    if math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
        raise ValueError(f"{where}: shape {shape} in {dtype} needs other than bytes {begin} to {end}")
    if end > data_bytes:
        raise ValueError(
            f"{where}: bytes {begin} to {end} lie outside the file's {data_bytes} bytes of data; truncated?"
        )
    return tuple(shape)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_match(path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, torch.Size]) -> None:
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    mismatched = [
        f"{name} is {list(found[name])} where the configuration needs {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != tuple(shape)
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:_NAMES_SHOWN])}{', ...' if len(names) > _NAMES_SHOWN else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
        if names
    ]
    if problems:
        raise ValueError(f"{path}: weights of another architecture than its configuration's: {'; '.join(problems)}")
