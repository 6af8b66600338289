"""The training loss: squared residuals of a network's output, against noise that is drawn again instead of read.

``fastddpm/ops/twins.py`` has the twin of a residual.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastddpm.kernels.launch import (
    PIXELS,
    SCALAR,
    STRIDED,
    VECTOR,
    Launch,
    Words,
    cover,
    launch_grid,
    load,
    per_row,
    program,
    sample_stride,
    split4,
    split_words,
    store,
    tile_groups,
    tile_samples,
)
from fastddpm.kernels.noise import normals4
from torch import Tensor

COLUMNS = tl.constexpr(3)
# Rows of a tile that lie in one warp: their sum takes shuffles only, no shared memory and no barrier.
WARP = 32

RUNTIME = (
    "m_ptr", "x_ptr", "scale_ptr", "out_ptr", "rows_ptr", "row_ptr", "seed_ptr", "id_ptr", "step_ptr",
    "batch", "count", "row_stride", "seed_stride", "id_stride", "step_stride", "stream",
)  # fmt: skip


@triton.jit
def _tile(
    ptrs, coefficients, key, base, g, offset, live, n, plane, channel,
    USE_X0: tl.constexpr, COUNTER: tl.constexpr, GRADIENT: tl.constexpr, HALVES: tl.constexpr, M_NHWC: tl.constexpr,
    CHANNELS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The residuals of a tile: store their multiples if GRADIENT; and return each group's sum of squares, [T].

    ``g`` [T] counts groups in the sample; or, in a loop over channels, in ``channel``, which is ``offset`` groups in.
    """
    m_ptr, x_ptr, out_ptr = ptrs
    c_eps, c_x0, scale = coefficients
    LOOP: tl.constexpr = M_NHWC and ALIGNED
    FLAT: tl.constexpr = VECTOR if ALIGNED else SCALAR
    NHWC: tl.constexpr = PIXELS if ALIGNED else STRIDED
    M_ACCESS: tl.constexpr = NHWC if M_NHWC else FLAT
    WIDTH: tl.constexpr = CHANNELS * HALVES
    index = g.to(tl.int64) * 4
    e = index
    if LOOP:
        e = index + channel * plane
        g = g + offset.to(tl.uint32)
    m_index = index if M_NHWC else e

    m = load(m_ptr, base * HALVES, m_index, live, n, plane, WIDTH, channel, M_ACCESS)
    if COUNTER:
        seed, sample_id, step, stream = key
        target = c_eps * normals4(seed, sample_id, step, stream, g)
        if USE_X0:
            target = target + c_x0 * load(x_ptr, base, e, live, n, plane, CHANNELS, channel, FLAT)
    else:
        target = c_x0 * load(x_ptr, base, e, live, n, plane, CHANNELS, channel, FLAT)
    residual = target - m
    if GRADIENT:
        store(out_ptr, base * HALVES, m_index, scale * residual, live, n, plane, WIDTH, channel, M_ACCESS)
    exists = live[:, None]
    if not ALIGNED:
        # Noise has no mask of its own: a sample's last group may be cut short.
        exists = exists & (e[:, None] + tl.arange(0, 4)[None, :] < n)
    r0, r1, r2, r3 = split4(tl.where(exists, residual * residual, 0.0))
    return (r0 + r1) + (r2 + r3)


@triton.jit(do_not_specialize=RUNTIME)
def _ddpm_loss_kernel(
    m_ptr, x_ptr, scale_ptr, out_ptr, rows_ptr, row_ptr, seed_ptr, id_ptr, step_ptr,
    batch, count, row_stride, seed_stride, id_stride, step_stride, stream,
    USE_X0: tl.constexpr, COUNTER: tl.constexpr, GRADIENT: tl.constexpr, HALVES: tl.constexpr, M_NHWC: tl.constexpr,
    CHANNELS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_G: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """sum of r^2, or the gradient scale * r, with r = (c_eps * eps + c_x0 * x_0) - m   (Ho et al. 2020, eq. 14).

    Inputs    m: the network's output, n or (HALVES = 2; the second half is not read) 2 n elements a sample, contiguous
              or (M_NHWC) channels-last; x_0: [batch, n] contiguous, if USE_X0; fp32/fp16/bf16 each.
              rows: [R, 3] fp32, the third column is not read; row, seed, sample_id, step: int64, stride 1 per sample
              or 0 for all; scale: [batch] fp32, if GRADIENT
    Output    partial sums of squares: [batch, programs * BLOCK_G / LANES] fp32, each over LANES groups (times
              CHANNELS in a loop over channels); or the gradient, laid out as m
    Grid      ``launch_grid``; if m is channels-last, a tile is a block of pixels and loops over channels
    Counts    as in ``p_sample``
    Traffic   sums: 1 read = 4 B/element at fp32, 8 if USE_X0; gradient: 1 write more (x_0 is not read for the
              epsilon target, nor is eps for any)
    Numerics  fp32 inside, no contraction; the residual and the gradient are bit-equal to ``twins.residual``; a sum has
              a fixed order: that of the four, of channels, of the lanes of a warp, and then of the partial sums
    Noise     noise-v1 if COUNTER, else none
    """
    LOOP: tl.constexpr = M_NHWC and ALIGNED
    plane = count.to(tl.int64)
    if ALIGNED:
        plane = plane * 4
    n = plane * CHANNELS
    groups = count
    if not ALIGNED:
        groups = (n + 3) // 4
    s, exists = tile_samples(batch, BLOCK_G, TILE)
    row = rows_ptr + tl.load(row_ptr + s * row_stride) * COLUMNS
    scale = 0.0
    if GRADIENT:
        scale = per_row(tl.load(scale_ptr + s), BLOCK_G, TILE)
    coefficients = (per_row(tl.load(row), BLOCK_G, TILE), per_row(tl.load(row + 1), BLOCK_G, TILE), scale)
    key = (0, 0, 0, 0)
    if COUNTER:
        seed = tl.load(seed_ptr + s * seed_stride)
        sample_id = tl.load(id_ptr + s * id_stride)
        key = (seed, sample_id, tl.load(step_ptr + s * step_stride), stream)
    ptrs = (m_ptr, x_ptr, out_ptr)
    base = s.to(tl.int64) * n
    g, live = tile_groups(program(), groups, BLOCK_G, TILE)
    live = live & exists
    squares = tl.zeros((TILE,), tl.float32)
    if LOOP:
        for channel in range(CHANNELS):
            squares += _tile(
                ptrs, coefficients, key, base, g, channel * groups, live, n, plane, channel,
                USE_X0, COUNTER, GRADIENT, HALVES, M_NHWC, CHANNELS, ALIGNED,
            )  # fmt: skip
    else:
        squares = _tile(
            ptrs, coefficients, key, base, g, 0, live, n, plane, 0,
            USE_X0, COUNTER, GRADIENT, HALVES, M_NHWC, CHANNELS, ALIGNED,
        )  # fmt: skip
    if not GRADIENT:
        PARTS: tl.constexpr = BLOCK_G // LANES
        sums = tl.sum(tl.reshape(squares, (TILE // LANES, LANES)), axis=1, keep_dims=True)
        part = tl.arange(0, TILE // LANES)[:, None]
        sample = tl.program_id(0) * (TILE // BLOCK_G) + part // PARTS
        programs = (tl.num_programs(1) * tl.num_programs(2)).to(tl.int64)
        target = (sample * programs + program().to(tl.int64)) * PARTS + part % PARTS
        # Every lane of a warp holds the sum, and the first stores it. Addresses that rise along the lanes keep it
        # there: in any other order the sums would move between threads.
        lane = tl.arange(0, LANES)[None, :]
        sums = tl.broadcast_to(sums, (TILE // LANES, LANES))
        tl.store(out_ptr + target + lane, sums, mask=(lane == 0) & (sample < batch))


def ddpm_loss_launch(
    m: Tensor,
    x_0: Tensor | None,
    rows: Tensor,
    row: Tensor,
    noise: Words | None,
    learned: bool = False,
    scale: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Launch, Tensor]:
    """Sum the squared residuals of each sample, or with ``scale`` fill ``out`` with scale times the residuals.

    Args:
        m: the network's output, contiguous or channels-last, at least one element.
        x_0: contiguous [B, ...], where the target has a term in it.
        rows: float32 [R, 3] contiguous; row: int64 [B] or [1].
        noise: where the target has a term in it.
        learned: m has twice the channels, and the second half is left alone.
        scale: float32 [B] contiguous.
        out: laid out as m, or the first half of what is.

    Returns:
        The launch, and what it fills: ``out``, or partial sums float32 [B, P], P a function of n.
    """
    batch, halves, m_nhwc = len(m), 2 if learned else 1, not m.is_contiguous()
    n = m.numel() // (batch * halves)
    channels = m.shape[1] // halves if m_nhwc else 1
    count, groups, tile = cover(n, channels, m, x_0, out)
    grid = launch_grid(batch, groups)
    lanes = min(tile["BLOCK_G"], WARP)
    if out is None:
        parts = grid[1] * grid[2] * (tile["BLOCK_G"] // lanes)
        out = torch.empty(batch, parts, dtype=torch.float32, device=m.device)
    words, strides, stream = split_words(noise, batch)
    values = (m, x_0, scale, out, rows, row, *words, batch, count, sample_stride(row, batch), *strides, stream)
    flags = {
        "USE_X0": x_0 is not None, "COUNTER": noise is not None, "GRADIENT": scale is not None, "HALVES": halves,
        "M_NHWC": m_nhwc, "CHANNELS": channels, "LANES": lanes,
    }  # fmt: skip
    return Launch(_ddpm_loss_kernel, grid, values, flags | tile), out
