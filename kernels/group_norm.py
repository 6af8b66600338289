"""Group normalisation of channels-last images, with the additions before it and the activation after it.

``fastddpm/ops/group_norm.py`` has the twin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from fastddpm.kernels.launch import Launch
from torch import Tensor

# Values that a warp keeps in registers, 32 a thread; where the largest program cannot hold a group so, two passes.
WARP = 32 * 32
MOST_WARPS = 16
# Neighbouring channels that a program reads of a pixel, if it can: 32 bytes of bfloat16, what DRAM moves at once.
SECTOR = 16

WHOLE, SUMS, APPLY = 0, 1, 2
_SUMS = tl.constexpr(SUMS)
_APPLY = tl.constexpr(APPLY)

RUNTIME = (
    "x_ptr", "skip_ptr", "residual_ptr", "bias_ptr", "time_ptr", "weight_ptr", "beta_ptr", "sum_ptr", "parts_ptr",
    "y_ptr", "time_stride",
)  # fmt: skip


@triton.jit
def _load(ptr, offset, mask, ALIGNED: tl.constexpr):
    return tl.load(_pointers(ptr, offset, ALIGNED), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _pointers(ptr, offset, ALIGNED: tl.constexpr):
    """Pointers to runs of ALIGNED channels, each run aligned to its own width."""
    BYTES: tl.constexpr = ALIGNED * ptr.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(ptr + offset, (1, 1, BYTES))


@triton.jit
def _over_pixels(values):
    """Sum [P, G, D] over pixels and the channels of a group: [1, G, 1]."""
    return tl.sum(tl.sum(values, axis=2, keep_dims=True), axis=0, keep_dims=True)


@triton.jit(do_not_specialize=RUNTIME)
def _group_norm_kernel(
    x_ptr, skip_ptr, residual_ptr, bias_ptr, time_ptr, weight_ptr, beta_ptr, sum_ptr, parts_ptr, y_ptr, time_stride,
    PASS: tl.constexpr, SILU: tl.constexpr, SCALE_SHIFT: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, TINY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = silu((u - mean) / sqrt(var + TINY) * weight + beta), u = x + bias + time + residual   (Wu & He 2018, eq. 1).

    Inputs    x, residual: [batch, PIXELS, FIRST]; skip: [batch, PIXELS, CHANNELS - FIRST], the channels of u behind
              those of x; fp32/fp16/bf16, all alike. bias: [FIRST]; weight, beta: [CHANNELS];
              time: [batch, FIRST], rows time_stride apart; or if SCALE_SHIFT [batch, 2 CHANNELS], scale and shift,
              for y * (1 + scale) + shift before silu
    Output    y: [batch, PIXELS, CHANNELS]; if sum_ptr, u likewise, and what is normalised is u as stored
    Grid      samples, blocks of BLOCK_G groups of WIDTH channels, PARTS blocks of BLOCK_P pixels
    Passes    WHOLE: one block has all pixels, and keeps its values in registers. Else SUMS leaves mean and squared
              deviations of each block in parts, [batch, groups, PARTS, 2] fp32, and APPLY reads them, and u once more
    Traffic   1 read + 1 write = 4 B/element at bf16, 8 with residual and sum; in two passes 6 and 10; memory bound
    Numerics  fp32 inside, no contraction; the mean first, then squares of what is left; one rounding at each store.
              exp2 and the division in silu are the hardware's, within 2 ulp each
    """
    part = tl.program_id(2)
    sample = tl.program_id(0).to(tl.int64)
    p = part * BLOCK_P + tl.arange(0, BLOCK_P)[:, None, None]
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    c = g * WIDTH + d
    exists = (p < PIXELS) & (d < WIDTH)
    PADDED: tl.constexpr = BLOCK_D != WIDTH or PIXELS % BLOCK_P != 0
    # A sample's elements are counted in 32 bits, which saves registers.
    base = sample * (PIXELS * CHANNELS)
    at = p * CHANNELS + c
    if PASS == _APPLY and sum_ptr is not None:
        u = _load(sum_ptr + base, at, exists, ALIGNED)
    else:
        first = exists & (c < FIRST)
        x_base = sample * (PIXELS * FIRST)
        u = _load(x_ptr + x_base, p * FIRST + c, first, ALIGNED)
        added = tl.zeros((1, BLOCK_G, BLOCK_D), tl.float32)
        if bias_ptr is not None:
            added += tl.load(bias_ptr + c, mask=(d < WIDTH) & (c < FIRST), other=0.0).to(tl.float32)
        if time_ptr is not None and not SCALE_SHIFT:
            time = time_ptr + sample * time_stride + c
            added += tl.load(time, mask=(d < WIDTH) & (c < FIRST), other=0.0).to(tl.float32)
        if bias_ptr is not None or (time_ptr is not None and not SCALE_SHIFT):
            u = u + added
        if residual_ptr is not None:
            u = u + _load(residual_ptr + x_base, p * FIRST + c, first, ALIGNED)
        if FIRST < CHANNELS:
            skip = skip_ptr + sample * (PIXELS * (CHANNELS - FIRST))
            behind = _load(skip, p * (CHANNELS - FIRST) + (c - FIRST), exists & (c >= FIRST), ALIGNED)
            u = tl.where(c < FIRST, u, behind)
        if sum_ptr is not None:
            stored = u.to(sum_ptr.dtype.element_ty)
            tl.store(_pointers(sum_ptr + base, at, ALIGNED), stored, mask=exists)
            u = stored.to(tl.float32)

    if PASS == _APPLY:
        k = tl.arange(0, BLOCK_K)[:, None, None]
        at_part = parts_ptr + ((sample * (CHANNELS // WIDTH) + g) * PARTS + k) * 2
        held = k < PARTS
        count = tl.where(held, tl.minimum(PIXELS - k * BLOCK_P, BLOCK_P), 0).to(tl.float32) * WIDTH
        means = tl.load(at_part, mask=held, other=0.0)
        mean = tl.sum(means * count, axis=0, keep_dims=True) / (PIXELS * WIDTH)
        apart = means - mean
        squares = tl.load(at_part + 1, mask=held, other=0.0) + apart * apart * count
        squares = tl.sum(squares, axis=0, keep_dims=True)
        left = u - mean
    else:
        count = tl.minimum(PIXELS - part * BLOCK_P, BLOCK_P).to(tl.float32) * WIDTH
        if PADDED:
            u = tl.where(exists, u, 0.0)
        mean = tl.div_rn(_over_pixels(u), count)
        left = u - mean
        if PADDED:
            left = tl.where(exists, left, 0.0)
        squares = _over_pixels(left * left)
    if PASS == _SUMS:
        at_part = parts_ptr + ((sample * (CHANNELS // WIDTH) + g) * PARTS + part) * 2
        tl.store(at_part, mean)
        tl.store(at_part + 1, squares)
    else:
        scale = tl.load(weight_ptr + c, mask=d < WIDTH, other=0.0).to(tl.float32)
        shift = tl.load(beta_ptr + c, mask=d < WIDTH, other=0.0).to(tl.float32)
        if SCALE_SHIFT:
            time = time_ptr + sample * time_stride + c
            factor = 1.0 + tl.load(time, mask=d < WIDTH, other=0.0).to(tl.float32)
            scale = scale * factor
            shift = shift * factor + tl.load(time + CHANNELS, mask=d < WIDTH, other=0.0).to(tl.float32)
        y = left * (tl.div_rn(1.0, tl.sqrt_rn(squares / (PIXELS * WIDTH) + TINY)) * scale) + shift
        if SILU:
            y = y / (1.0 + tl.exp2(y * -1.4426950408889634))
        tl.store(_pointers(y_ptr + base, at, ALIGNED), y.to(y_ptr.dtype.element_ty), mask=exists)


def group_norm_launches(
    x: Tensor,
    weight: Tensor,
    beta: Tensor,
    groups: int,
    tiny: float,
    skip: Tensor | None,
    residual: Tensor | None,
    bias: Tensor | None,
    time: Tensor | None,
    scale_shift: bool,
    silu: bool,
    y: Tensor,
    u: Tensor | None,
) -> Iterator[Launch]:
    """Fill ``y``, and ``u`` if given; one launch, or two where one program cannot hold a group.

    Args:
        x, residual: dense channels-last [B, C, H, W] of one dtype; skip: [B, S, H, W] likewise; y, u: [B, C + S, H, W]
            likewise, under 2^31 elements a sample.
        weight, beta: contiguous [C + S]; bias: [C].
        time: [B, C], or with ``scale_shift`` [B, 2 (C + S)], rows contiguous; one row is for all.
    """
    batch, first, pixels = len(x), x.shape[1], x.shape[2:].numel()
    channels = y.shape[1]
    width = channels // groups
    block_p, block_g, block_d = _blocks(pixels, groups, width)
    parts = -(-pixels // block_p)
    passes = (WHOLE,) if parts == 1 else (SUMS, APPLY)
    sums = None if parts == 1 else torch.empty(batch, groups, parts, 2, dtype=torch.float32, device=x.device)
    moved = [t for t in (x, skip, residual, u, y) if t is not None]
    run = math.gcd(16 // x.element_size(), width, first) if all(t.data_ptr() % 16 == 0 for t in moved) else 1
    stride = 0 if time is None or len(time) == 1 else time.stride(0)
    values = (x, skip, residual, bias, time, weight, beta, u, sums, y, stride)
    flags = {
        "SILU": silu, "SCALE_SHIFT": scale_shift, "PIXELS": pixels, "CHANNELS": channels, "FIRST": first,
        "WIDTH": width, "TINY": tiny, "ALIGNED": run, "BLOCK_P": block_p, "BLOCK_G": block_g, "BLOCK_D": block_d,
        "PARTS": parts, "BLOCK_K": _power(parts),
    }  # fmt: skip
    warps = min(max(block_p * block_g * block_d // WARP, 1), MOST_WARPS)
    for each in passes:
        grid = (batch, groups // block_g, parts)
        yield Launch(_group_norm_kernel, grid, values, flags | {"PASS": each}, warps)


def _blocks(pixels: int, groups: int, width: int) -> tuple[int, int, int]:
    """Pixels, groups and channels of a group that a program covers, each a power of two."""
    block_p, block_g, block_d = _power(pixels), 1, _power(width)
    most = groups & -groups
    while block_g < most and (block_g * block_d < SECTOR or block_p * block_g * block_d < 4 * WARP):
        block_g *= 2
    if block_p * block_g * block_d > WARP * MOST_WARPS:
        block_p = max(8 * WARP // (block_g * block_d), 1)
    return block_p, block_g, block_d


def _power(n: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << (n - 1).bit_length()
