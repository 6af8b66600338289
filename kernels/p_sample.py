"""The reverse step: one table row per sample, executed in one pass over memory.

``fastddpm/ops/twins.py`` is the twin.
"""

from __future__ import annotations

from collections import namedtuple

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
    repeats,
    sample_stride,
    split_words,
    store,
    tile_groups,
    tile_samples,
)
from fastddpm.kernels.noise import horner, normals4
from torch import Tensor

EXP_POLY = tl.constexpr(
    (
        1.0,
        1.0,
        float.fromhex("0x1.fffffcp-2"),
        float.fromhex("0x1.555492p-3"),
        float.fromhex("0x1.5558b0p-5"),
        float.fromhex("0x1.12398ep-7"),
        float.fromhex("0x1.6a4d5ep-10"),
    )
)
NAN = tl.constexpr(tl.PropagateNan.ALL)

RUNTIME = (
    "x_ptr", "m_ptr", "z_ptr", "ring_ptr", "out_ptr", "x0_out_ptr", "low_ptr",
    "rows_ptr", "row_ptr", "seed_ptr", "id_ptr", "step_ptr",
    "batch", "count", "repeat", "row_stride", "seed_stride", "id_stride", "step_stride", "stream",
)  # fmt: skip


@triton.jit
def _exp(y):
    """e**y by the project's polynomial (``fastddpm/ops/twins.py``); y is held to [-87, 88], NaN stays."""
    y = tl.minimum(tl.maximum(y, -87.0, propagate_nan=NAN), 88.0, propagate_nan=NAN)
    shifted = y * 1.4426950216293335 + 12582912.0
    n = shifted - 12582912.0
    r = (y - n * 0.693359375) - n * -2.1219444170128554e-4
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    return horner(r, EXP_POLY, 7) * power


# The columns of a table row, in their order in memory.
Row = namedtuple("Row", "a b lo hi c_x0 c_xt c_m c_1 sigma h0 h1 w c_2 c_3")
COLUMNS = tl.constexpr(len(Row._fields))


@triton.jit
def _row(ptr, BLOCK_G: tl.constexpr, TILE: tl.constexpr):
    """Load a row; the columns that nothing reads are never loaded."""
    columns = ()  # type: tuple
    for k in tl.static_range(COLUMNS):
        columns += (per_row(tl.load(ptr + k), BLOCK_G, TILE),)
    return Row(*columns)


@triton.jit
def _update(x, m, v, z, x0_1, x0_2, x0_3, row, CLIP: tl.constexpr, USE_M: tl.constexpr):
    """The arithmetic of a row, every operation rounded on its own: (x_prev, x0). A term whose tensor is None is off."""
    x0 = row.a * x + row.b * m
    if CLIP:
        x0 = tl.maximum(x0, row.lo, propagate_nan=NAN)
        x0 = tl.minimum(x0, row.hi, propagate_nan=NAN)
    x_prev = row.c_x0 * x0 + row.c_xt * x
    if USE_M:
        x_prev = x_prev + row.c_m * m
    if x0_1 is not None:
        x_prev = x_prev + row.c_1 * x0_1
    if x0_2 is not None:
        x_prev = x_prev + row.c_2 * x0_2
    if x0_3 is not None:
        x_prev = x_prev + row.c_3 * x0_3
    if z is not None:
        std = row.sigma
        if v is not None:
            std = row.sigma * _exp(row.h0 + row.h1 * v)
        x_prev = tl.where(row.sigma == 0.0, x_prev, x_prev + std * z)
    return x_prev, x0


@triton.jit
def _slot(row, AGE: tl.constexpr, HISTORY: tl.constexpr):
    """Where the ring holds the x0 of AGE rows before ``row``."""
    return ((row + (HISTORY - AGE)).to(tl.uint32) % HISTORY).to(tl.int64)


@triton.jit(do_not_specialize=RUNTIME)
def _p_sample_kernel(
    x_ptr, m_ptr, z_ptr, ring_ptr, out_ptr, x0_out_ptr, low_ptr, rows_ptr, row_ptr, seed_ptr, id_ptr, step_ptr,
    batch, count, repeat, row_stride, seed_stride, id_stride, step_stride, stream,
    CLIP: tl.constexpr, LEARNED: tl.constexpr, GUIDED: tl.constexpr, USE_M: tl.constexpr, HISTORY: tl.constexpr,
    M_NHWC: tl.constexpr, LOW_NHWC: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_G: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """x_prev = mean(x_t, x0) + std * z, x0 = clip(a * x_t + b * m): one table row   (Ho et al. 2020, eqs. 7, 11, 15).

    Inputs    x_t, z: [batch, n] contiguous; m: the network's output, n or (LEARNED) 2 n elements a sample,
              2 batch samples if GUIDED, contiguous or (M_NHWC) channels-last; fp32/fp16/bf16 each.
              rows: [R, 14] fp32; row, seed, sample_id, step: int64, stride 1 per sample or 0 for all
    Output    x_prev: [batch, n], may alias x_t; where they are passed, x0, and low, a copy of x_prev that is contiguous
              or (LOW_NHWC) channels-last
    Ring      [HISTORY, batch, n]: the x0 of k rows before lies in slot (row - k) mod HISTORY; x0 takes the
              place of the oldest, by the thread that read it
    Grid      ``launch_grid``; if a tensor is channels-last, a tile is a block of pixels and loops over channels
    Counts    n = CHANNELS * plane, CHANNELS = 1 if nothing is channels-last; count: the plane in groups of four (in
              elements if not ALIGNED); repeat: tiles that a program walks
    Traffic   2 reads + 1 write = 12 B/element at fp32, 16 + 4 HISTORY with a history; coefficients from L1; memory
              bound
    Numerics  fp32 inside, no contraction, one rounding at each store; bit-equal to ``twins.p_sample``
    Noise     noise-v1 if a seed is passed, else z if that is; not added where sigma is 0
    """
    LOOP: tl.constexpr = (M_NHWC or LOW_NHWC) and ALIGNED
    FLAT: tl.constexpr = VECTOR if ALIGNED else SCALAR
    NHWC: tl.constexpr = PIXELS if ALIGNED else STRIDED
    M_ACCESS: tl.constexpr = NHWC if M_NHWC else FLAT
    LOW_ACCESS: tl.constexpr = NHWC if LOW_NHWC else FLAT
    HALVES: tl.constexpr = 2 if LEARNED else 1
    M_CHANNELS: tl.constexpr = CHANNELS * HALVES
    plane = count.to(tl.int64)
    if ALIGNED:
        plane = plane * 4
    n = plane * CHANNELS
    groups = count
    if not ALIGNED:
        groups = (n + 3) // 4
    s, exists = tile_samples(batch, BLOCK_G, TILE)
    row_index = tl.load(row_ptr + s * row_stride)
    row = _row(rows_ptr + row_index * COLUMNS, BLOCK_G, TILE)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr + s * seed_stride)
        sample_id = tl.load(id_ptr + s * id_stride)
        step = tl.load(step_ptr + s * step_stride)
    base = s.to(tl.int64) * n
    m_base = base * HALVES
    size = batch.to(tl.int64) * n
    if HISTORY >= 1:
        newest = base + _slot(row_index, 1, HISTORY) * size
        oldest = base + _slot(row_index, HISTORY, HISTORY) * size
    if HISTORY == 3:
        second = base + _slot(row_index, 2, HISTORY) * size

    rounds = CHANNELS if LOOP else (repeat if BLOCK_G == TILE else 1)
    for k in range(rounds):
        channel = k if LOOP else 0
        tile = program() if LOOP else program() * repeat + k
        g, live = tile_groups(tile, groups, BLOCK_G, TILE)
        live = live & exists
        index = g.to(tl.int64) * 4
        e = index + channel * plane
        m_index = index if M_NHWC else e
        x = load(x_ptr, base, e, live, n, plane, CHANNELS, channel, FLAT)
        m = load(m_ptr, m_base, m_index, live, n, plane, M_CHANNELS, channel, M_ACCESS)
        if GUIDED:
            m_u = load(m_ptr, m_base + size * HALVES, m_index, live, n, plane, M_CHANNELS, channel, M_ACCESS)
            m = m_u + row.w * (m - m_u)
        v = None
        if LEARNED:
            v_base = m_base + (CHANNELS if M_NHWC else n)
            v = load(m_ptr, v_base, m_index, live, n, plane, M_CHANNELS, channel, M_ACCESS)
        x0_1 = None
        x0_2 = None
        x0_3 = None
        if HISTORY >= 1:
            x0_1 = load(ring_ptr, newest, e, live, n, plane, CHANNELS, channel, FLAT)
        if HISTORY == 2:
            x0_2 = load(ring_ptr, oldest, e, live, n, plane, CHANNELS, channel, FLAT)
        if HISTORY == 3:
            x0_2 = load(ring_ptr, second, e, live, n, plane, CHANNELS, channel, FLAT)
            x0_3 = load(ring_ptr, oldest, e, live, n, plane, CHANNELS, channel, FLAT)
        z = None
        if seed_ptr is not None:
            z = normals4(seed, sample_id, step, stream, g + (channel * groups).to(tl.uint32))
        if z_ptr is not None:
            z = load(z_ptr, base, e, live, n, plane, CHANNELS, channel, FLAT)

        x_prev, x0 = _update(x, m, v, z, x0_1, x0_2, x0_3, row, CLIP, USE_M)
        store(out_ptr, base, e, x_prev, live, n, plane, CHANNELS, channel, FLAT)
        if HISTORY >= 1:
            store(ring_ptr, oldest, e, x0, live, n, plane, CHANNELS, channel, FLAT)
        if x0_out_ptr is not None:
            store(x0_out_ptr, base, e, x0, live, n, plane, CHANNELS, channel, FLAT)
        if low_ptr is not None:
            low_index = index if LOW_NHWC else e
            store(low_ptr, base, low_index, x_prev, live, n, plane, CHANNELS, channel, LOW_ACCESS)


def p_sample_launch(
    x_t: Tensor,
    m: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Words | Tensor | None,
    out: Tensor,
    *,
    clip: bool = False,
    learned: bool = False,
    guided: bool = False,
    use_m: bool = False,
    history: int = 0,
    ring: Tensor | None = None,
    x0_out: Tensor | None = None,
    low_out: Tensor | None = None,
) -> Launch:
    """Execute one row of a table for each sample.

    Args:
        x_t, out, x0_out: contiguous [B, ...], at least one element; z likewise, if given.
        ring: contiguous [history, B, ...], if there is a history; its oldest slot is overwritten.
        m, low_out: contiguous or channels-last.
        rows: float32 [R, 14] contiguous; row: int64 [B] or [1].
        clip, learned, guided, use_m, history: what is computed, see ``twins.p_sample``.
    """
    batch, n = len(x_t), x_t.shape[1:].numel()
    given = noise if isinstance(noise, Tensor) else None
    m_nhwc, low_nhwc = not m.is_contiguous(), low_out is not None and not low_out.is_contiguous()
    nhwc = m_nhwc or low_nhwc
    channels = x_t.shape[1] if nhwc else 1
    count, groups, tile = cover(n, channels, x_t, m, given, ring, out, x0_out, low_out)
    repeat = 1 if nhwc and tile["ALIGNED"] else repeats(batch, groups)
    words, strides, stream = split_words(noise, batch)
    values = (
        x_t, m, given, ring, out, x0_out, low_out, rows, row, *words,
        batch, count, repeat, sample_stride(row, batch), *strides, stream,
    )  # fmt: skip
    flags = {
        "CLIP": clip, "LEARNED": learned, "GUIDED": guided, "USE_M": use_m, "HISTORY": history,
        "M_NHWC": m_nhwc, "LOW_NHWC": low_nhwc, "CHANNELS": channels,
    }  # fmt: skip
    return Launch(_p_sample_kernel, launch_grid(batch, groups, repeat), values, flags | tile)
