"""Calls of the fused group normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class NormCase:
    """Shapes and switches of one call; ``time`` counts its rows, ``size`` is the height and width."""

    batch: int
    channels: int
    size: tuple[int, int]
    groups: int
    skip: int = 0
    residual: bool = False
    bias: bool = False
    time: int = 0
    scale_shift: bool = False
    silu: bool = True
    keep: bool = False

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """Random tensors, whose groups have means and variances of their own."""
        generator = torch.Generator().manual_seed(self.channels + self.size[0])

        def normal(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator).to(dtype)
            return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

        image, total = (self.batch, self.channels, *self.size), self.channels + self.skip
        return {
            "x": normal(*image) + normal(self.channels)[:, None, None],
            "weight": normal(total),
            "beta": normal(total),
            "groups": self.groups,
            "tiny": 1e-5,
            "skip": 2 * normal(self.batch, self.skip, *self.size) if self.skip else None,
            "residual": normal(*image) if self.residual else None,
            "bias": normal(self.channels) if self.bias else None,
            "time": normal(self.time, 2 * total if self.scale_shift else self.channels) if self.time else None,
            "scale_shift": self.scale_shift,
            "silu": self.silu,
            "keep": self.keep,
        }


# Groups of 2, 4, 6 and 12 channels, some across the end of x; one pixel, whole warps, pixels that fill no power of two;
# one program and several; and groups that no program holds.
CASES = [
    NormCase(2, 8, (4, 4), 4, silu=False),
    NormCase(2, 32, (8, 8), 8, residual=True, bias=True, keep=True),
    NormCase(2, 16, (8, 8), 4, skip=8, residual=True, bias=True, time=2, keep=True),
    NormCase(2, 32, (4, 4), 4, skip=16, bias=True),
    NormCase(2, 12, (5, 3), 3, time=1),
    NormCase(2, 16, (8, 8), 4, bias=True, time=2, scale_shift=True),
    NormCase(3, 4, (1, 1), 1),
    NormCase(1, 64, (16, 16), 32, bias=True, time=1),
    NormCase(1, 8, (96, 96), 2, skip=4, residual=True, bias=True, keep=True),
    NormCase(1, 128, (16, 16), 1, bias=True, time=1),
]
