"""A call through torch.compile, whose failure is a warning and not the end; what compiles, and where code is kept.

What lies in the caches of torch.compile, Triton and this library is loaded and executed: whoever can write to such a
folder can run code as its owner. The defaults are folders of the user; a shared one belongs to nobody.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib
import importlib.util
import logging
import os
import shutil
import stat
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastddpm.errors import BackendUnavailable

logger = logging.getLogger("fastddpm")

NO_CPU = "Triton has no CPU backend"
# Compute capability of the oldest GPU that Triton compiles for.
_OLDEST = (7, 5)
# And what a container calls the one outside.
_ROOT = (0, 65534)


def compile_call(
    function: Callable[..., Any], *, strict: bool, dynamic: bool | None = None, name: str = "the model"
) -> Callable[..., Any]:
    """Return a function that is compiled as one graph at its first call.

    Args:
        strict: raise where torch.compile fails (BackendUnavailable); else warn once and go on uncompiled.
        dynamic: whether sizes are left open, see torch.compile.
        name: what the function is, for the warning.
    """
    if isinstance(function, types.FunctionType):
        # Dynamo keeps what it compiles with the code object, and gives up on one after eight compilations.
        code = function.__code__.replace(co_name=function.__name__)
        function = types.FunctionType(code, function.__globals__, function.__name__, closure=function.__closure__)
    call: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=dynamic)

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal call
        if call is function:
            return function(*args, **kwargs)
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            return call(*args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit, BackendUnavailable) as error:
            reason = f"torch.compile failed: {_explain(error)}"
            if strict:
                raise BackendUnavailable(reason) from error
            logger.warning("%s runs uncompiled: %s", name, reason)
            call = function
            return function(*args, **kwargs)

    return run


def _explain(error: Exception) -> str:
    """The gist of an error, and the cache to look at where generated code could not be built or loaded."""
    from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit

    found = error.__cause__ if isinstance(error, FailOnRecompileLimitHit) else error
    lines = str(found).strip().splitlines()
    if not isinstance(error, BackendCompilerFailed):
        return lines[0]
    # The first line says who raised, the second what.
    cache = inductor_cache()
    return f"{' '.join(lines[:2])}; if {cache.path} is damaged, remove it or set {cache.variable} to another folder"


def named_kernels() -> contextlib.AbstractContextManager[Any]:
    """Have what compiles inside for a CPU name each of its kernels to profilers, where this torch can."""
    from torch._inductor import config

    name = "enable_kernel_profile"
    return config.patch({f"cpp.{name}": True}) if hasattr(config.cpp, name) else contextlib.nullcontext()


def has_triton() -> bool:
    """Tell whether Triton, which torch.compile needs on CUDA, is installed."""
    return importlib.util.find_spec("triton") is not None


def why_not_triton(device: torch.device) -> str | None:
    """Return why the kernels cannot run on ``device``, and what to do about it; None if they can."""
    try:
        kernels = importlib.import_module("fastddpm.kernels.noise")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install it with 'pip install triton' (Linux)"
    interpreted = type(kernels._randn_kernel).__name__ == "InterpretedFunction"
    if device.type == "cpu":
        if interpreted:
            return None
        return (
            f"{NO_CPU}; move the tensors to a GPU, or set TRITON_INTERPRET=1 before Python starts to run the kernels "
            "in its interpreter (slow, for tests)"
        )
    if device.type != "cuda":
        return f"there are kernels for CUDA and ROCm devices only, not for {device.type!r}"
    if interpreted:
        return "TRITON_INTERPRET is set, so the kernels are interpreted on the CPU; unset it"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False; install a CUDA build of PyTorch and a driver"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST:
            return f"Triton needs compute capability 7.5, this GPU has {capability[0]}.{capability[1]}"
    return triton_cache().why_unusable() or _why_no_driver()


def _why_no_driver() -> str | None:
    """Return why Triton cannot reach the GPU: it compiles a small C module for that, once for each cache."""
    try:
        importlib.import_module("triton.runtime.driver").driver.active.get_current_target()
    except Exception as error:
        return (
            f"Triton cannot build its driver ({error}); install a C compiler (gcc or clang, or set CC) and Python's "
            "headers"
        )
    return None


def has_cpp_compiler() -> bool:
    """Tell whether a C++ compiler, which torch.compile needs on a CPU, is there."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return any(name and shutil.which(name.split()[0]) for name in names)


@dataclass(frozen=True)
class Cache:
    """One of the three caches.

    Attributes:
        path: where it lies; it need not exist yet.
        writable: it can be written, or made.
        open_part: it, or a folder above it, that others could put something else into: see `is_open`; None if none.
    """

    variable: str
    path: Path
    writable: bool
    open_part: Path | None

    def why_unusable(self) -> str | None:
        """Return what is wrong and which variable to set; None if it can be used."""
        if self.writable:
            return None
        return f"compiled code cannot be kept in {self.path}: set {self.variable} to a folder that can be written"


def inductor_cache() -> Cache:
    """The cache of torch.compile."""
    return _find_cache("TORCHINDUCTOR_CACHE_DIR", lambda: Path(tempfile.gettempdir()) / f"torchinductor_{_user()}")


def triton_cache() -> Cache:
    """The cache of Triton."""
    return _find_cache(
        "TRITON_CACHE_DIR",
        lambda: Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~")) / ".triton" / "cache",
    )


def package_cache() -> Cache:
    """The cache of compiled networks, see `packages`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return _find_cache("FASTDDPM_CACHE_DIR", lambda: Path(base or os.path.expanduser("~/.cache")) / "fastddpm")


def _find_cache(variable: str, default: Callable[[], Path]) -> Cache:
    path = Path(os.environ.get(variable) or default())
    # The nearest thing that exists; below a file nothing can be made.
    existing = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return Cache(variable, path, writable, _open_part(path))


def _open_part(path: Path) -> Path | None:
    # As ssh does for keys: who can write to a folder above can put another in the place of this one.
    places = (path.absolute(), path.resolve())
    parts = [(part, part not in places) for place in places for part in (place, *place.parents) if part.exists()]
    return next((part for part, above in parts if is_open(part.stat(), above=above)), None)


def is_open(entry: os.stat_result, *, above: bool = False) -> bool:
    """Tell whether a file or folder is another user's, or its group or everybody may write to it.

    Args:
        above: it is a folder above the one in question: it may be root's, and where only owners can rename what is in
            it, as in /tmp, others may write to it.
    """
    # Windows has no such ids, and Triton's caches are on Linux.
    if hasattr(os, "geteuid") and entry.st_uid != os.geteuid() and not (above and entry.st_uid in _ROOT):
        return True
    return bool(entry.st_mode & 0o022) and not (above and entry.st_mode & stat.S_ISVTX)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):
        return f"uid_{os.getuid()}"
