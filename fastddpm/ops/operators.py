"""How a fused operation becomes a PyTorch operator, ``torch.ops.fastddpm.*``: opaque to torch.compile and torch.export.

``torch.library.custom_op`` would do it too, but imports Dynamo at a process's first call, which takes as long as
importing torch. Noise travels as a list and a stream: [seed, sample_id, step] of a Counter, [z] of the caller's, or [].
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastddpm.noise.v1 import Counter
from fastddpm.ops import twins
from fastddpm.ops.backend import use_triton

NOISE = "Tensor[] noise, int stream"
HOW = "str backend, bool compiled"
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
