"""Checkpoints of other libraries (.pt, .pth, .ckpt, .bin): tensors and plain values only, nothing is ever executed.

torch.load runs with weights_only=True, always; there is no fallback, since the fallback would be the hole.
"""

from __future__ import annotations

import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

# A training checkpoint with optimiser and moving average has some 10,000 storages and 2 MB of pickle.
MAX_ENTRIES = 100_000
MAX_PICKLE_BYTES = 64 << 20
_PLACE_OF_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint that torch.save wrote, without executing anything in it.

    Args:
        path: a file in torch's zip format or its older one.

    Returns:
        The dict that was saved; its tensors are on the CPU, in a zip file mapped rather than read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds anything but tensors and plain values, is damaged, or is no dict; the archive is compressed
            or names files outside itself.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: not a regular file")
    archive = zipfile.is_zipfile(path)
    if archive:
        _check_archive(path)
    try:
        with warnings.catch_warnings():
            # About pickle protocols: the file is read whole or refused.
            warnings.simplefilter("ignore")
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, error)) from None
    except Exception as error:
        raise ValueError(f"{path}: no usable checkpoint: {type(error).__name__}: {_first_line(error)}") from None
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: must hold a dict of tensors, got {type(value).__name__}")
    for name, tensor in _tensors(value):
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: {name[:120]!r} claims shape {list(tensor.shape)}, more than the file stores for it"
            )
    return dict(value)


def _check_archive(path: Path) -> None:
    """Refuse what torch.save does not write: compression (a bomb would need it), and names that leave the archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ValueError(f"{path}: damaged archive: {error}") from None
    if len(entries) > MAX_ENTRIES:
        raise ValueError(f"{path}: {len(entries)} entries; at most {MAX_ENTRIES} are read")
    size = path.stat().st_size
    for entry in entries:
        name = PurePosixPath(entry.filename)
        if name.is_absolute() or ".." in name.parts or "\\" in entry.filename:
            raise ValueError(f"{path}: entry {entry.filename[:120]!r} points outside the archive")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
            raise ValueError(f"{path}: entry {entry.filename[:120]!r} is compressed, which torch.save never does")
        if name.name == "data.pkl" and entry.file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"{path}: {entry.file_size} bytes of pickle; at most {MAX_PICKLE_BYTES} are read")


def _refusal(path: Path, error: Exception) -> str:
    # torch's own message recommends weights_only=False, which is what this refuses.
    found = _PLACE_OF_GLOBAL.search(str(error))
    what = f"it needs {found[1]}" if found else "its pickle needs more than torch's restricted reader does"
    return (
        f"{path}: refused, since it holds more than tensors and plain values ({what}), and such objects can run code "
        "when loaded; where you trust the file, save its weights alone: torch.save(model.state_dict(), 'weights.pt')"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["unreadable"])[0][:200]


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in nested dicts, lists and tuples, with its place."""
    pending: list[tuple[str, Any]] = [(name, value)]
    seen: set[int] = set()
    while pending:
        place, item = pending.pop()
        if isinstance(item, Tensor):
            yield place, item
        elif isinstance(item, Mapping | list | tuple) and id(item) not in seen:
            # A pickle can hold itself.
            seen.add(id(item))
            parts = item.items() if isinstance(item, Mapping) else enumerate(item)
            pending.extend((f"{place}.{key}" if place else str(key), part) for key, part in parts)
