"""Where torch.compile, Triton and this library keep compiled code.

What lies there is loaded and executed: whoever can write to such a folder can run code as its owner. The defaults are
folders of the user; a shared one belongs to nobody.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cache:
    """One of the three caches.

    Attributes:
        variable: environment variable that moves it.
        path: where it lies; it need not exist yet.
        writable: it can be written, or made.
        others_can_write: it exists, and is somebody else's, or its group or everybody may write to it.
    """

    variable: str
    path: Path
    writable: bool
    others_can_write: bool

    def why_unusable(self) -> str | None:
        """Return what is wrong and which variable to set; None if it can be used."""
        if self.writable:
            return None
        return f"compiled code cannot be kept in {self.path}: set {self.variable} to a folder that can be written"


def inductor() -> Cache:
    """The cache of torch.compile."""
    return _look("TORCHINDUCTOR_CACHE_DIR", lambda: Path(tempfile.gettempdir()) / f"torchinductor_{_user()}")


def triton() -> Cache:
    """The cache of Triton."""
    return _look(
        "TRITON_CACHE_DIR",
        lambda: Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~")) / ".triton" / "cache",
    )


def packages() -> Cache:
    """The cache of compiled networks, see `packages`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return _look("FASTDDPM_CACHE_DIR", lambda: Path(base or os.path.expanduser("~/.cache")) / "fastddpm")


def _look(variable: str, default: Callable[[], Path]) -> Cache:
    path = Path(os.environ.get(variable) or default())
    # The nearest thing that exists; below a file nothing can be made.
    existing = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return Cache(variable, path, writable, path.is_dir() and is_open(path.stat()))


def is_open(entry: os.stat_result) -> bool:
    """Tell whether a file or folder is another user's, or its group or everybody may write to it."""
    # Windows has no such ids, and Triton's caches are on Linux.
    foreign = hasattr(os, "geteuid") and entry.st_uid != os.geteuid()
    return foreign or bool(entry.st_mode & 0o022)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):
        return f"uid_{os.getuid()}"
