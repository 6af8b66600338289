"""Checkpoints of other libraries (.pt, .pth, .ckpt, .bin): listed first, then read tensor by tensor.

The list costs no memory for a tensor, whatever the file claims, and nothing in the file is executed (see
`fastddpm.files.pickles`). What is read is bounded by the file's size, views of one storage counted as often as they
occur.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from fastddpm.checks import shown
from fastddpm.files.outside import regular_size
from fastddpm.files.pickles import MAX_PICKLE_BYTES, OtherTensor, RefusedObjectError, Storage, StoredTensor, unpickle

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# A training checkpoint with optimiser and moving average has some 10,000 storages.
MAX_ENTRIES = 100_000
MAX_DEPTH, MAX_NAME = 16, 500
# What torch.save wrote before everything else until torch 1.6, and still does on request.
_LEGACY = (0x1950A86A20F9469CFC6C, 1001)
_DAMAGE = (ValueError, OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile)


class Checkpoint:
    """The tensors of a file that torch.save wrote, by their dotted places in it.

    Args:
        path: a file in torch's zip format or its older one.

    Attributes:
        tensors: what it holds, in the file's order; the entries of a list are named by their numbers.

    Raises:
        ValueError: it is no regular file, holds anything but tensors and plain values, is damaged, or stores less than
            it claims; the archive is compressed or names files outside itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = regular_size(path)
        self._archive = zipfile.is_zipfile(path)
        # Of each storage its name in the archive, or its first byte.
        self._places: dict[str, str | int] = {}
        self._last: tuple[str, bytearray] = ("", bytearray())
        try:
            with path.open("rb") as stream:
                value = self._list_archive(stream) if self._archive else self._list_legacy(stream)
            self.tensors = dict(_named_tensors(value))
        except RefusedObjectError as error:
            raise ValueError(
                f"{path}: refused, since it holds more than tensors and plain values (it needs {error}), and such "
                "objects can run code when loaded; load it in the program that wrote it and save its weights alone: "
                "torch.save(checkpoint['state_dict'], 'weights.pt')"
            ) from None
        except _DAMAGE as error:
            raise ValueError(f"{path}: no usable checkpoint: {error}") from None

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors as float32 copies on the CPU.

        Raises:
            ValueError: one is no dense tensor of real floating point numbers or is damaged, or together they take more
                memory than the file has bytes.
        """
        chosen = {name: self._admitted(name) for name in names}
        total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in chosen.values())
        if total > self._size:
            raise ValueError(
                f"{self.path}: {len(chosen)} tensors of {total} bytes in a file of {self._size} bytes: most are views "
                "of the same numbers; save each of them once"
            )
        try:
            return {name: self._read_tensor(tensor) for name, tensor in chosen.items()}
        except _DAMAGE as error:
            raise ValueError(f"{self.path}: no usable checkpoint: {error}") from None

    def _admitted(self, name: str) -> StoredTensor:
        tensor = self.tensors[name]
        if isinstance(tensor, StoredTensor) and tensor.dtype in FLOATING:
            return tensor
        kind = tensor.dtype if isinstance(tensor, StoredTensor) else tensor.kind
        raise ValueError(f"{self.path}: {shown(name)} is {kind}, not a dense tensor of real floating point numbers")

    def _read_tensor(self, tensor: StoredTensor) -> Tensor:
        numbers = torch.frombuffer(self._bytes(tensor.storage), dtype=tensor.dtype) if tensor.storage.nbytes else None
        if numbers is None or 0 in tensor.shape:
            return torch.empty(tensor.shape, device="cpu")
        return numbers.as_strided(tensor.shape, tensor.stride, tensor.offset).to(torch.float32, copy=True).contiguous()

    def _bytes(self, storage: Storage) -> bytearray:
        # Parameters that are views of one storage follow one another.
        if self._last[0] != storage.key:
            place = self._places[storage.key]
            if isinstance(place, str):
                with zipfile.ZipFile(self.path) as archive:
                    content = bytearray(archive.read(place))
            else:
                with self.path.open("rb") as stream:
                    stream.seek(place)
                    content = bytearray(stream.read(storage.nbytes))
            self._last = (storage.key, content)
        return self._last[1]

    def _list_archive(self, stream: Any) -> Any:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ENTRIES:
                raise ValueError(f"{len(entries)} entries; at most {MAX_ENTRIES} are read")
            for entry in entries:
                self._check_entry(entry)
            pickles = [entry for entry in entries if PurePosixPath(entry.filename).name == "data.pkl"]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"{len(pickles)} files called data.pkl, where one of at most {MAX_PICKLE_BYTES} bytes")
            folder = pickles[0].filename.removesuffix("data.pkl")
            sizes = {entry.filename: entry.file_size for entry in entries}
            if sizes.get(f"{folder}byteorder", 0) and archive.read(f"{folder}byteorder") != b"little":
                raise ValueError("written on a big-endian machine")
            value, storages = unpickle(io.BytesIO(archive.read(pickles[0])))
        for storage in storages.values():
            name = f"{folder}data/{storage.key}"
            if sizes.get(name, -1) != storage.nbytes:
                raise ValueError(
                    f"storage {shown(storage.key)} claims {storage.nbytes} bytes, and {sizes.get(name, 0)} are stored"
                )
            self._places[storage.key] = name
        return value

    def _check_entry(self, entry: zipfile.ZipInfo) -> None:
        name = PurePosixPath(entry.filename)
        if name.is_absolute() or ".." in name.parts or "\\" in entry.filename:
            raise ValueError(f"entry {shown(entry.filename)} points outside the archive")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > self._size:
            raise ValueError(f"entry {shown(entry.filename)} is compressed, which torch.save never does")

    def _list_legacy(self, stream: Any) -> Any:
        head = io.BytesIO(stream.read(MAX_PICKLE_BYTES))
        if tuple(unpickle(head)[0] for _ in _LEGACY) != _LEGACY:
            raise ValueError("no file that torch.save writes")
        system = unpickle(head)[0]
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError("written on a big-endian machine")
        value, storages = unpickle(head)
        keys = unpickle(head)[0]
        if not isinstance(keys, list) or {str(key) for key in keys} != storages.keys() or len(keys) != len(storages):
            raise ValueError(f"{len(storages)} storages are claimed, and others are stored")
        place = head.tell()
        for key in map(str, keys):
            stream.seek(place)
            storage, length = storages[key], int.from_bytes(stream.read(8), "little")
            place += 8 + storage.nbytes
            if length != storage.length or place > self._size:
                raise ValueError(f"storage {shown(key)} claims {storage.length} numbers, and fewer are stored")
            self._places[key] = place - storage.nbytes
        return value


def _named_tensors(value: Any) -> Iterator[tuple[str, StoredTensor | OtherTensor]]:
    """Yield every tensor in nested dicts, lists and tuples with its dotted place, in order."""
    pending: list[tuple[str, Any, int]] = [("", value, 0)]
    seen: set[int] = set()
    while pending:
        place, item, depth = pending.pop()
        if isinstance(item, StoredTensor | OtherTensor):
            yield place, item
        elif isinstance(item, Mapping | list | tuple) and id(item) not in seen:
            # A pickle can hold itself.
            seen.add(id(item))
            parts = item.items() if isinstance(item, Mapping) else enumerate(item)
            named = [(f"{place}.{key}" if place else str(key), part, depth + 1) for key, part in parts]
            if any(len(name) > MAX_NAME for name, *_ in named) or depth > MAX_DEPTH:
                raise ValueError(f"names of more than {MAX_NAME} characters, or nested deeper than {MAX_DEPTH} levels")
            pending.extend(reversed(named))
