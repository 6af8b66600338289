"""Files that are whole or absent: written beside their place, synced, then moved into it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO


def write_files(contents: Mapping[Path, bytes | Callable[[IO[bytes]], object]]) -> None:
    """Replace files by new contents, bytes or what a function writes to a stream; folders are created.

    All are on disk before the first is moved into its place, and they are moved in the mapping's order, so a crash or a
    full disk leaves the old files, the new ones or, for an instant, a leading part of the new ones, each of them whole.
    What a killed process leaves behind is `temporary_of` them.

    Raises:
        OSError: the disk is full, a folder is not writable; the old files are intact.
    """
    staged: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            staged[path] = temporary_of(path, os.getpid())
            _write_synced(staged[path], content)
        for path, temporary in staged.items():
            os.replace(temporary, path)
    finally:
        for temporary in staged.values():
            with contextlib.suppress(OSError):
                temporary.unlink()
    for folder in {path.parent for path in contents}:
        _sync_folder(folder)


def temporary_of(path: Path, pid: int) -> Path:
    """Where a process writes a file before it is whole."""
    return path.with_name(f".{path.name}.{pid}.tmp")


def _write_synced(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    with path.open("wb") as stream:
        if isinstance(content, bytes):
            stream.write(content)
        else:
            content(stream)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    # Some systems cannot open or sync a folder; its files are on disk already.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
