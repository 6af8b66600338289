"""How a fused operation becomes a PyTorch operator, ``torch.ops.fastddpm.*``, and which of its two forms runs.

An operator is opaque to torch.compile and torch.export. ``torch.library.custom_op`` would make one too, but imports
Dynamo at a process's first call, which takes as long as importing torch. Noise travels as a list and a stream: [seed,
sample_id, step] of a Counter, [z] of the caller's, or []. What runs is the Triton kernel, or its twin in PyTorch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastddpm.checks import one_of
from fastddpm.errors import BackendUnavailable
from fastddpm.machine.torch_compile import triton_cache
from fastddpm.noise.v1 import Counter
from fastddpm.ops import twins

logger = logging.getLogger("fastddpm")

NOISE = "Tensor[] noise, int stream"
HOW = "str backend, bool compiled"
BACKENDS = ("auto", "triton", "torch")
# Compute capability of the oldest GPU that Triton compiles for.
_OLDEST = (7, 5)
_NO_CPU = "Triton has no CPU backend"

_LIBRARY = torch.library.Library("fastddpm", "FRAGMENT")

Targets = tuple[Tensor | None, ...]


def define(
    schema: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Define an operator with one body for the CPU and CUDA, and return it.

    Args:
        schema: "name(arguments) -> result".
        body: what runs; it chooses between kernel and twin.
        fake: the same on tensors without data.
        setup, backward: see ``torch.library.register_autograd``.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, body, key)
    torch.library.register_fake(f"fastddpm::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"fastddpm::{name}", backward, setup_context=setup, lib=_LIBRARY)
    return getattr(torch.ops.fastddpm, name).default


def pack(noise: Counter | Tensor | None) -> tuple[list[Tensor], int]:
    """Noise as an operator's arguments."""
    if isinstance(noise, Counter):
        return [noise.seed, noise.sample_id, noise.step], noise.stream
    return [] if noise is None else [noise], 0


def unpack(noise: Sequence[Tensor], stream: int) -> Counter | Tensor | None:
    """Undo `pack`."""
    if len(noise) == 3:
        return Counter(noise[0], noise[1], noise[2], stream)
    return noise[0] if noise else None


def execute(name: str, targets: Targets, arguments: tuple[Any, ...], backend: str, compiled: bool) -> None:
    """Fill the targets with the results of an operation, by its kernel or by its twin; None: not wanted."""
    first = targets[0]
    assert first is not None
    if use_triton(backend, first.device):
        getattr(importlib.import_module("fastddpm.ops.triton_backend"), name)(targets, *arguments)
    else:
        twins.fill(getattr(twins, name), targets, arguments, compiled)
    # PyTorch sees neither what a kernel writes nor what is written below autograd.
    torch.autograd.graph.increment_version([t for t in targets if t is not None])


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


@functools.cache
def _say_once(reason: str) -> None:
    logger.info("the fused operations run in PyTorch: %s", reason)
