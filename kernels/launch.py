"""A launch as a value, to be run, or compiled without a GPU; and what every kernel's arguments share."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from fastddpm.kernels.tiles import NUM_WARPS, TILE, block_groups
from torch import Tensor

NOISE_NONE, NOISE_COUNTER, NOISE_GIVEN = 0, 1, 2

# Key and counter words of a draw: seed, sample_id and step, int64 [B] or [1] each, and the stream.
Words = tuple[Tensor, Tensor, Tensor, int]

_TYPES = {
    **{torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"},
    **{torch.int64: "*i64", torch.uint8: "*u8"},
}


class Launch(NamedTuple):
    """One launch of a kernel.

    No argument carries an assumption about divisibility: alignment is the constant ``ALIGNED``, and everything that is
    no constant is in ``do_not_specialize``. So the launch's own code can be compiled from tensors without data.

    Attributes:
        kernel: the jitted function.
        grid: programs on each axis.
        values: the arguments in the kernel's order, those that are no constants: tensors, None or ints.
        flags: the constants by name.
        warps: of a program.
    """

    kernel: Any
    grid: tuple[int, int, int]
    values: tuple[Tensor | int | None, ...]
    flags: dict[str, Any]
    warps: int = NUM_WARPS

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told. Contraction is off by name: Triton's default differs and changes bits."""
        return {"num_warps": self.warps, "enable_fp_fusion": False}

    def run(self) -> None:
        """Launch on the device of the first argument."""
        first = self.values[0]
        assert isinstance(first, Tensor)
        # Triton launches on whatever device is current.
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            self.kernel[self.grid](*self.values, **self.flags, **self.options)

    def compile(self) -> None:
        """Compile for the current device what `run` would launch."""
        self.kernel.warmup(*self.values, grid=self.grid, **self.flags, **self.options)

    @property
    def arguments(self) -> dict[str, Tensor | int | None]:
        """The values by name."""
        return dict(zip(self.kernel.arg_names, self.values, strict=False))

    @property
    def constants(self) -> dict[str, Any]:
        """What is compiled in: the flags, and None for a tensor that is not passed."""
        return {name: None for name, value in self.arguments.items() if value is None} | self.flags

    @property
    def signature(self) -> dict[str, str]:
        """Triton's types of the arguments that are no constants."""
        return {name: _type(value) for name, value in self.arguments.items() if value is not None}


def _type(value: Tensor | int) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


def tile_constants(groups: int, aligned: bool) -> dict[str, Any]:
    """The constants that follow from the shape."""
    return {"ALIGNED": aligned, "BLOCK_G": block_groups(groups), "TILE": TILE}


def is_aligned(n: int, *tensors: Tensor | None) -> bool:
    """Whether groups of four can move as one: whole groups in n elements, and 16-byte aligned storage throughout."""
    return n % 4 == 0 and all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def split_words(noise: Words | Tensor | None, batch: int) -> tuple[tuple[Tensor | None, ...], list[int], int]:
    """The tensors of a counter, their strides per sample, and its stream; None and 0 for other noise."""
    if noise is None or isinstance(noise, Tensor):
        return (None, None, None), [0, 0, 0], 0
    *words, stream = noise
    return tuple(words), [sample_stride(word, batch) for word in words], stream


def sample_stride(values: Tensor, batch: int) -> int:
    """0 for one value for all samples, 1 for one each."""
    if values.shape not in ((1,), (batch,)) or not values.is_contiguous():
        raise ValueError(f"expected contiguous [1] or [{batch}], got {tuple(values.shape)}, strides {values.stride()}")
    return 0 if values.shape[0] == 1 else 1
