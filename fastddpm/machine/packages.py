"""Compiled networks that outlive the process that built them.

A package is native code that AOTInductor made of one network for one shape, its weights inside. It lies in a folder of
the user under the hash of everything that decides its code and its numbers, where any later process finds it. What lies
there is executed: it is used only where no other user can write (see `torch_compile`) and while its SHA-256, kept
beside it, is right; anything else is built again. A package elsewhere is used only where the caller names the file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.errors import BackendUnavailable
from fastddpm.files.atomic import write_files
from fastddpm.machine.allocator import memory_given_back
from fastddpm.machine.hardware import instruction_set
from fastddpm.machine.torch_compile import is_open, package_cache

logger = logging.getLogger("fastddpm")

SUFFIX, HASH, LOCK, WORK = ".pt2", ".sha256", ".lock", ".build"
# In a build's folder: the number of its process.
PID = "pid"
METADATA = "fastddpm"
# Of all names: what else lies in the folder is not touched.
_KEY = "[0-9a-f]" * 32

# Of all packages together; those used longest ago go first.
MAX_BYTES = 4 << 30


class Code:
    """A loaded package: called with tensors like those that it was built for, it returns one tensor."""

    def __init__(self, path: Path) -> None:
        # torch._inductor.aoti_load_package wraps this class, after importing Inductor and asking the C++ compiler what
        # the processor can do: seconds, and a compiler that need not be there.
        try:
            run = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).run
            self._run = lambda inputs: run(inputs)[0]
        except (AttributeError, TypeError):  # in this torch it is another class
            whole = torch._inductor.aoti_load_package(str(path))
            self._run = lambda inputs: whole(*inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run it."""
        return self._run(list(inputs))


def identify(**facts: str) -> dict[str, str]:
    """Return what decides a package: the facts given, and torch, its threads and the processor."""
    surroundings = {
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "processor": instruction_set(),
    }
    return {**facts, **surroundings}


def path_of(identity: Mapping[str, str]) -> Path:
    """Where the cache keeps the package of an identity."""
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    return package_cache().path / f"{key}{SUFFIX}"


def find(identity: Mapping[str, str]) -> Code | None:
    """Load the package of an identity from the cache; None where there is none that may be run."""
    path, cache = path_of(identity), package_cache()
    if cache.open_part is not None and cache.path.is_dir():
        reason = f"others can write to {cache.open_part}: set {cache.variable} to a folder of yours"
        logger.warning("compiled code in %s is not used, %s", cache.path, reason)
        return None
    if not is_whole(path):
        return None
    try:
        code = load(path, identity)
    except BackendUnavailable as error:
        logger.warning("%s", error)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return code


def load(path: Path, identity: Mapping[str, str]) -> Code:
    """Load a package from a file. It is native code: whoever wrote it can do whatever the caller can.

    Raises:
        BackendUnavailable: it is no package, or one of another network, shape, torch or processor.
    """
    found = identity_of(path)
    other = [
        f"{name} {found.get(name, 'none')} instead of {identity.get(name, 'none')}"
        for name in sorted({*found, *identity})
        if found.get(name) != identity.get(name)
    ]
    if other:
        raise BackendUnavailable(f"{path} was compiled for {'; '.join(other)}: build it again")
    try:
        # Its weights are copied out of it.
        with memory_given_back():
            return Code(path)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise BackendUnavailable(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error


def identity_of(path: Path) -> dict[str, str]:
    """Return what a package says it was built from and for; nothing in it is run.

    Raises:
        BackendUnavailable: it cannot be read, or is no package of this library.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("wrapper_metadata.json")]
            found = json.loads(json.loads(archive.read(names[0]))[METADATA])
    except OSError as error:
        raise BackendUnavailable(f"{path} cannot be read: {error.strerror}") from error
    except (zipfile.BadZipFile, LookupError, ValueError) as error:
        raise BackendUnavailable(f"{path} is no package of this library") from error
    return dict(found)


def is_whole(path: Path) -> bool:
    """Whether a package of the cache is there, no other user can write to it, and it is as it was written."""
    try:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()  # by pieces: a package is as large as a network
        return not is_open(path.stat()) and path.with_suffix(HASH).read_text() == found
    except (OSError, ValueError):
        return False


def store(path: Path, content: bytes) -> None:
    """Put a package into the cache, and remove others where all together take more than `MAX_BYTES`.

    Raises:
        OSError: it cannot be written.
    """
    files = {path: content, path.with_suffix(HASH): hashlib.sha256(content).hexdigest().encode()}
    write_files(files)
    for file in files:
        file.chmod(0o600)  # whatever the umask: `is_whole` asks
    room = MAX_BYTES
    for other in reversed(stored()):
        room -= other.stat().st_size
        if room < 0 and other != path:
            remove(other)


def stored() -> list[Path]:
    """The packages in the cache, those used longest ago first."""
    return sorted(package_cache().path.glob(f"{_KEY}{SUFFIX}"), key=lambda path: path.stat().st_mtime)


def remove(path: Path) -> None:
    """Remove a package from the cache."""
    for file in (path, path.with_suffix(HASH)):
        file.unlink(missing_ok=True)


def clear() -> int:
    """Remove all packages from the cache, and what killed builds have left; return how many builds are running."""
    for path in stored():
        remove(path)
    return sweep()


def sweep() -> int:
    """Remove what killed builds have left in the cache; return how many builds are running."""
    import filelock

    folder, running = package_cache().path, 0
    left = [*folder.glob(f"{_KEY}{WORK}"), *folder.glob(f".{_KEY}.*.tmp")]
    for key in sorted({entry.name.lstrip(".")[:32] for entry in left}):
        try:
            with locked(folder / f"{key}{SUFFIX}", 0):
                shutil.rmtree(folder / f"{key}{WORK}", ignore_errors=True)
                for temporary in folder.glob(f".{key}.*.tmp"):
                    temporary.unlink(missing_ok=True)
        except filelock.Timeout:
            running += 1
    return running


def locked(path: Path, timeout: float) -> contextlib.AbstractContextManager[Any]:
    """Hold the lock of a package, which the system gives up when its holder dies; timeout < 0 waits for ever.

    Raises:
        filelock.Timeout: another process holds it for so many seconds.
    """
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return filelock.FileLock(path.with_suffix(LOCK)).acquire(timeout=timeout)


def builder(path: Path) -> str:
    """Name the process that builds a package, for messages."""
    try:
        return f"process {int((path.with_suffix(WORK) / PID).read_text())}"
    except (OSError, ValueError):
        return "another process"


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 of a module's weights, see `tensors_digest`."""
    return tensors_digest(module.state_dict())


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@functools.cache
def source_digest(*folders: Path) -> str:
    """Return the SHA-256 of the Python files in folders: code that is compiled from others is other code."""
    digest = hashlib.sha256()
    for path in sorted(file for folder in folders for file in folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
