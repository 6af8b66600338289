"""What all kernels share: how programs cover a batch, and a launch as a value that is run, or compiled without a GPU.

A program covers a tile of ``TILE`` rows; a row is one group (4 consecutive elements of a sample) and belongs to one
thread, so that one Philox counter serves it and float32 moves 128 bits at a time. A sample of few groups shares its
tile with others. Samples lie on grid axis 0, since the other axes end at 65,535; the tiles of a sample on axes 1 and 2.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# How a group of four lies in memory: consecutive and aligned; consecutive; one channel of four channels-last pixels;
# four elements in C order of a channels-last sample (a group may then span two channels).
VECTOR = tl.constexpr(0)
SCALAR = tl.constexpr(1)
PIXELS = tl.constexpr(2)
STRIDED = tl.constexpr(3)

# Two groups a thread: the key schedule and the first, uniform rounds of Philox are shared between them.
TILE = 256
NUM_WARPS = 4
_AXIS = 65535
_BLOCKS = tuple(1 << k for k in reversed(range(TILE.bit_length())))
# A tile of several samples loads a row, a seed and an id per group: as costly as a third of its lanes left idle.
_SHARING = 1.33
# Four programs for every block that an H100 holds at once (132 SMs x 12 blocks of 128 threads at 40 registers).
_ENOUGH_PROGRAMS = 6336
# 16 groups of float32 are two cache lines: a larger sample is not cut finer.
_SMALLEST_BLOCK = 16

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


def cover(n: int, channels: int, *tensors: Tensor | None) -> tuple[int, int, dict[str, Any]]:
    """How a kernel counts samples of n elements: (count, groups, the constants that follow).

    Groups of four can move as one if channels hold whole groups, and all storage is 16-byte aligned.

    Args:
        channels: those that a channels-last tensor is read by, else 1.
    """
    plane = n // channels
    aligned = plane % 4 == 0 and all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
    groups = plane // 4 if aligned else -(-n // 4)
    return groups if aligned else plane, groups, {"ALIGNED": aligned, "BLOCK_G": block_groups(groups), "TILE": TILE}


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


@lru_cache(maxsize=1024)
def block_groups(groups: int) -> int:
    """Groups of one sample that a tile covers: a power of two, from the sample's size alone (never the batch's)."""

    def cost(block: int) -> float:
        return -(-groups // block) * block * (1.0 if block == TILE else _SHARING)

    smallest = min(_SMALLEST_BLOCK, 1 << max(groups - 1, 0).bit_length())
    return min((b for b in _BLOCKS if b >= smallest), key=cost)


@lru_cache(maxsize=1024)
def repeats(batch: int, groups: int) -> int:
    """Tiles of a sample that one program walks: several, once there are programs enough to fill any GPU.

    A tile that samples share is walked alone: each thread would keep its sample's row and keys in registers meanwhile.
    """
    block = block_groups(groups)
    if block != TILE:
        return 1
    tiles = -(-groups // block)
    programs = tiles * -(-batch // (TILE // block))
    # Powers of two near 2**32 groups: see launch_grid.
    choices = (1, 2, 3, 4) if groups < 1 << 31 else (1, 2, 4)
    return max(r for r in choices if r == 1 or (tiles % r == 0 and programs // r >= _ENOUGH_PROGRAMS))


@lru_cache(maxsize=1024)
def launch_grid(batch: int, groups: int, repeat: int = 1) -> tuple[int, int, int]:
    """Programs on the three grid axes for ``batch`` samples of ``groups`` groups, each walking ``repeat`` tiles.

    The last axis is a power of two, as block and repeat are: rounded up to it, the programs of a sample cover at most
    2**32 groups, so that the groups of a surplus program do not wrap around to live ones.
    """
    block = block_groups(groups)
    programs = -(-groups // (block * repeat))
    depth = 1 << (-(-programs // _AXIS) - 1).bit_length()
    return -(-batch // (TILE // block)), -(-programs // depth), depth


@triton.jit
def program():
    """Which of its sample's programs this one is."""
    return (tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)).to(tl.uint32)


@triton.jit
def tile_samples(batch, BLOCK_G: tl.constexpr, TILE: tl.constexpr):
    """Sample of each row of a tile, a scalar where the tile holds one sample, and whether it exists.

    Rows beyond the batch repeat the last sample, so that its row of the table and its seed can be read without a mask.
    """
    s = tl.program_id(0)
    exists = tl.full((TILE,), 1, tl.int1)
    if BLOCK_G != TILE:
        s = s * (TILE // BLOCK_G) + tl.arange(0, TILE) // BLOCK_G
        exists = s < batch
        s = tl.minimum(s, batch - 1)
    return s, exists


@triton.jit
def tile_groups(tile, groups, BLOCK_G: tl.constexpr, TILE: tl.constexpr):
    """Group (uint32) of each row of a sample's ``tile``-th tile, and whether it exists."""
    g = tile.to(tl.uint32) * BLOCK_G + (tl.arange(0, TILE) % BLOCK_G).to(tl.uint32)
    # Compared with the last one, since 2**32 groups are 0 as uint32.
    return g, g <= (groups - 1).to(tl.uint32)


@triton.jit
def per_row(value, BLOCK_G: tl.constexpr, TILE: tl.constexpr):
    """A per-sample value, ready to meet a [TILE, 4] tile."""
    if BLOCK_G != TILE:
        value = value[:, None]
    return value


@triton.jit
def join4(a0, a1, a2, a3):
    """Four [T] tensors as the columns of [T, 4]. This nesting keeps a row in one thread: no layout conversion."""
    return tl.reshape(tl.join(tl.join(a0, a2), tl.join(a1, a3)), (a0.shape[0], 4))


@triton.jit
def split4(x):
    """The columns of [T, 4]."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    a0, a2 = tl.split(even)
    a1, a3 = tl.split(odd)
    return a0, a1, a2, a3


@triton.jit
def _vector(ptr, start):
    """Pointers to whole groups that start at ``start`` (int64 [T]), each aligned to its own width."""
    BYTES: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 2
    return tl.multiple_of(ptr + (start[:, None] + tl.arange(0, 4)[None, :]), (BYTES, BYTES))


@triton.jit
def _offset(index, plane, width, channel, ACCESS: tl.constexpr):
    if ACCESS == PIXELS:
        return index * width + channel
    if ACCESS == STRIDED:
        return (index % plane) * width + index // plane
    return index


@triton.jit
def _mask(live, index, n, ACCESS: tl.constexpr):
    """Which of the elements at ``index`` exist; pixels come in whole groups."""
    if ACCESS == PIXELS:
        return live
    return live & (index < n)


@triton.jit
def load(ptr, base, index, live, n, plane, width, channel, ACCESS: tl.constexpr):
    """A group of four elements of the sample at ``base`` per row, float32 [T, 4]; 0 where there is none.

    Args:
        index: int64 [T], where the group starts: an element, or for PIXELS a pixel of ``channel``.
        live: int1 [T], rows that exist; the others are not read either, since another thread may write there.
        n: the sample's size, where a group may be cut short (SCALAR, STRIDED).
        plane, width: pixels and channels of a channels-last sample.
    """
    if ACCESS == VECTOR:
        return tl.load(_vector(ptr, base + index), mask=live[:, None], other=0.0).to(tl.float32)
    p = ptr + base
    i1 = index + 1
    i2 = index + 2
    i3 = index + 3
    x0 = tl.load(p + _offset(index, plane, width, channel, ACCESS), mask=live, other=0.0)
    x1 = tl.load(p + _offset(i1, plane, width, channel, ACCESS), mask=_mask(live, i1, n, ACCESS), other=0.0)
    x2 = tl.load(p + _offset(i2, plane, width, channel, ACCESS), mask=_mask(live, i2, n, ACCESS), other=0.0)
    x3 = tl.load(p + _offset(i3, plane, width, channel, ACCESS), mask=_mask(live, i3, n, ACCESS), other=0.0)
    return join4(x0, x1, x2, x3).to(tl.float32)


@triton.jit
def store(ptr, base, index, value, live, n, plane, width, channel, ACCESS: tl.constexpr):
    """Round float32 [T, 4] once, to nearest even, and store it where :func:`load` reads."""
    value = value.to(ptr.dtype.element_ty)
    if ACCESS == VECTOR:
        tl.store(_vector(ptr, base + index), value, mask=live[:, None])
    else:
        p = ptr + base
        i1 = index + 1
        i2 = index + 2
        i3 = index + 3
        x0, x1, x2, x3 = split4(value)
        tl.store(p + _offset(index, plane, width, channel, ACCESS), x0, mask=live)
        tl.store(p + _offset(i1, plane, width, channel, ACCESS), x1, mask=_mask(live, i1, n, ACCESS))
        tl.store(p + _offset(i2, plane, width, channel, ACCESS), x2, mask=_mask(live, i2, n, ACCESS))
        tl.store(p + _offset(i3, plane, width, channel, ACCESS), x3, mask=_mask(live, i3, n, ACCESS))
