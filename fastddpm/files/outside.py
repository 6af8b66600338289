"""Files from outside: regular ones of a known size."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def regular_size(path: str | os.PathLike[str]) -> int:
    """Return the size of a regular file in bytes; a pipe or a device would wait, or never end.

    Raises:
        ValueError: it is a folder, a pipe, a device or a socket.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{Path(path)}: not a regular file")
    return status.st_size
