"""What comes from outside: regular files of a known size, and strings made fit for a message."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def regular_size(path: str | os.PathLike[str]) -> int:
    """Return the size of a regular file in bytes; a pipe or a device would wait, or never end.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, a pipe, a device or a socket.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{Path(path)}: not a regular file")
    return status.st_size


def shown(value: object, length: int = 120) -> str:
    """Return what came out of a file as one short printable line, without control characters."""
    if isinstance(value, int) and value.bit_length() > 4 * length:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
