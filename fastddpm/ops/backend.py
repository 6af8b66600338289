"""Which implementation runs an operation: the Triton kernel or its PyTorch twin."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging

import torch

from fastddpm.checks import one_of
from fastddpm.errors import BackendUnavailable
from fastddpm.machine.caches import triton

logger = logging.getLogger("fastddpm")

BACKENDS = ("auto", "triton", "torch")
# Compute capability of the oldest GPU that Triton compiles for.
_OLDEST = (7, 5)
_NO_CPU = "Triton has no CPU backend"


def check_backend(backend: str) -> None:
    """Raise ValueError for a name that is no backend."""
    one_of("backend", backend, BACKENDS)


@functools.lru_cache(maxsize=256)
def use_triton(backend: str, device: torch.device) -> bool:
    """Decide between kernel and twin.

    "auto" takes the kernel for GPU tensors where it can run, and says once at INFO why it could not. "triton" takes
    the kernel or raises; on the CPU that needs Triton's interpreter (TRITON_INTERPRET=1 set before triton is imported).

    Args:
        backend: "auto", "triton" or "torch".
        device: the tensors' device, with its index.

    Raises:
        BackendUnavailable: "triton" was asked for and cannot run; the message has the reason and the fix.
        ValueError: no such backend.
    """
    check_backend(backend)
    if backend == "torch":
        return False
    if backend == "auto" and device.type == "cpu":
        # Importing triton takes a second, and the answer does not depend on it.
        _say_once(_NO_CPU if importlib.util.find_spec("triton") else "Triton is not installed")
        return False
    reason = why_not_triton(device)
    if reason is None:
        return True
    if backend == "triton":
        raise BackendUnavailable(f"backend='triton' cannot run on {device}: {reason}; or use backend='torch'")
    _say_once(reason)
    return False


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
            f"{_NO_CPU}; move the tensors to a GPU, or set TRITON_INTERPRET=1 before Python starts to run the kernels "
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
    return triton().why_unusable() or _why_no_driver()


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


@functools.cache
def _say_once(reason: str) -> None:
    logger.info("the fused operations run in PyTorch: %s", reason)
