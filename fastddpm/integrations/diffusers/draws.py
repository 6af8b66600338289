"""Noise as diffusers draws it: torch's generators, also where a step is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Draw = Callable[[Tensor], Tensor]


@torch.library.custom_op("fastddpm::randn_of_torch", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _randn_of_torch(like: Tensor, shape: list[int]) -> Tensor:
    """Draw from torch's global generator: opaque, because Inductor's own generator draws other numbers than eager."""
    return torch.randn(shape, device=like.device, dtype=like.dtype)


@_randn_of_torch.register_fake
def _(like: Tensor, shape: list[int]) -> Tensor:
    return like.new_empty(shape)


def draw_like(output: Tensor, generator: Any = None) -> Tensor:
    """Draw z for the network's output as diffusers does: its shape, dtype and device; a list is one generator each."""
    if generator is None and torch.compiler.is_compiling():
        return _randn_of_torch(output, list(output.shape))
    return randn_tensor(output.shape, generator=generator, device=output.device, dtype=output.dtype)
