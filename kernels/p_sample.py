"""The reverse step: one table row per sample, executed in one pass over memory.

``fastddpm/ops/twins.py`` is the twin; ``p_sample_variant`` describes every variant for offline
compilation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastddpm.kernels import launch
from fastddpm.kernels.launch import OPTIONS, Variant, Words, is_aligned, make_variant, on_device, sample_stride
from fastddpm.kernels.noise import horner, normals4
from fastddpm.kernels.tiles import (
    PIXELS,
    SCALAR,
    STRIDED,
    VECTOR,
    launch_grid,
    load,
    per_row,
    program,
    repeats,
    store,
    tile_groups,
    tile_samples,
)
from torch import Tensor

COLUMNS = tl.constexpr(14)
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
NOISE_NONE = tl.constexpr(launch.NOISE_NONE)
NOISE_COUNTER = tl.constexpr(launch.NOISE_COUNTER)
NOISE_GIVEN = tl.constexpr(launch.NOISE_GIVEN)

RUNTIME = (
    "x_ptr", "m_ptr", "z_ptr", "x0_prev_ptr", "out_ptr", "x0_out_ptr", "low_ptr",
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


@triton.jit
def _coefficients(p, BLOCK_G: tl.constexpr, TILE: tl.constexpr):
    """The columns of a table row up to w; those that nothing reads are never loaded."""
    a = per_row(tl.load(p), BLOCK_G, TILE)
    b = per_row(tl.load(p + 1), BLOCK_G, TILE)
    lo = per_row(tl.load(p + 2), BLOCK_G, TILE)
    hi = per_row(tl.load(p + 3), BLOCK_G, TILE)
    c_x0 = per_row(tl.load(p + 4), BLOCK_G, TILE)
    c_xt = per_row(tl.load(p + 5), BLOCK_G, TILE)
    c_m = per_row(tl.load(p + 6), BLOCK_G, TILE)
    c_1 = per_row(tl.load(p + 7), BLOCK_G, TILE)
    sigma = per_row(tl.load(p + 8), BLOCK_G, TILE)
    h0 = per_row(tl.load(p + 9), BLOCK_G, TILE)
    h1 = per_row(tl.load(p + 10), BLOCK_G, TILE)
    w = per_row(tl.load(p + 11), BLOCK_G, TILE)
    return a, b, lo, hi, c_x0, c_xt, c_m, c_1, sigma, h0, h1, w


@triton.jit
def _update(x, m, v, z, x0_prev, coefficients, CLIP: tl.constexpr, USE_M: tl.constexpr):
    """The arithmetic of a row, every operation rounded on its own: (x_prev, x0). A term whose tensor is None is off."""
    a, b, lo, hi, c_x0, c_xt, c_m, c_1, sigma, h0, h1, _ = coefficients
    x0 = a * x + b * m
    if CLIP:
        x0 = tl.maximum(x0, lo, propagate_nan=NAN)
        x0 = tl.minimum(x0, hi, propagate_nan=NAN)
    x_prev = c_x0 * x0 + c_xt * x
    if USE_M:
        x_prev = x_prev + c_m * m
    if x0_prev is not None:
        x_prev = x_prev + c_1 * x0_prev
    if z is not None:
        std = sigma
        if v is not None:
            std = sigma * _exp(h0 + h1 * v)
        x_prev = tl.where(sigma == 0.0, x_prev, x_prev + std * z)
    return x_prev, x0


@triton.jit(do_not_specialize=RUNTIME)
def _p_sample_kernel(
    x_ptr, m_ptr, z_ptr, x0_prev_ptr, out_ptr, x0_out_ptr, low_ptr, rows_ptr, row_ptr, seed_ptr, id_ptr, step_ptr,
    batch, count, repeat, row_stride, seed_stride, id_stride, step_stride, stream,
    CLIP: tl.constexpr, LEARNED: tl.constexpr, GUIDED: tl.constexpr, USE_M: tl.constexpr, USE_PREV: tl.constexpr,
    X0_OUT: tl.constexpr, LOW_OUT: tl.constexpr, M_NHWC: tl.constexpr, LOW_NHWC: tl.constexpr, NOISE: tl.constexpr,
    CHANNELS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_G: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x_prev = mean(x_t, x0) + std * z, x0 = clip(a * x_t + b * m): one table row   (Ho et al. 2020, eqs. 7, 11, 15).

    Inputs    x_t, z, x0_prev: [batch, n] contiguous; m: the network's output, n or (LEARNED) 2 n elements a sample,
              2 batch samples if GUIDED, contiguous or (M_NHWC) channels-last; fp32/fp16/bf16 each.
              rows: [R, 14] fp32; row, seed, sample_id, step: int64, stride 1 per sample or 0 for all
    Output    x_prev: [batch, n], may alias x_t; x0 if X0_OUT; a copy if LOW_OUT, contiguous or (LOW_NHWC)
              channels-last
    Grid      ``tiles.launch_grid``; if a tensor is channels-last, a tile is a block of pixels and loops over channels
    Counts    n = CHANNELS * plane, CHANNELS = 1 if nothing is channels-last; count: the plane in groups of four (in
              elements if not ALIGNED); repeat: tiles that a program walks
    Traffic   2 reads + 1 write = 12 B/element at fp32; coefficients from L1; memory bound
    Numerics  fp32 inside, no contraction, one rounding at each store; bit-equal to ``twins.p_sample``
    Noise     noise-v1, or z, or none; not added where sigma is 0
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
    coefficients = _coefficients(rows_ptr + tl.load(row_ptr + s * row_stride) * COLUMNS, BLOCK_G, TILE)
    if NOISE == NOISE_COUNTER:
        seed = tl.load(seed_ptr + s * seed_stride)
        sample_id = tl.load(id_ptr + s * id_stride)
        step = tl.load(step_ptr + s * step_stride)
    base = s.to(tl.int64) * n
    m_base = base * HALVES
    half = batch.to(tl.int64) * (n * HALVES)

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
            m_u = load(m_ptr, m_base + half, m_index, live, n, plane, M_CHANNELS, channel, M_ACCESS)
            m = m_u + coefficients[11] * (m - m_u)
        v = None
        if LEARNED:
            v_base = m_base + (CHANNELS if M_NHWC else n)
            v = load(m_ptr, v_base, m_index, live, n, plane, M_CHANNELS, channel, M_ACCESS)
        x0_prev = None
        if USE_PREV:
            x0_prev = load(x0_prev_ptr, base, e, live, n, plane, CHANNELS, channel, FLAT)
        z = None
        if NOISE == NOISE_COUNTER:
            z = normals4(seed, sample_id, step, stream, g + (channel * groups).to(tl.uint32))
        if NOISE == NOISE_GIVEN:
            z = load(z_ptr, base, e, live, n, plane, CHANNELS, channel, FLAT)

        x_prev, x0 = _update(x, m, v, z, x0_prev, coefficients, CLIP, USE_M)
        store(out_ptr, base, e, x_prev, live, n, plane, CHANNELS, channel, FLAT)
        if X0_OUT:
            store(x0_out_ptr, base, e, x0, live, n, plane, CHANNELS, channel, FLAT)
        if LOW_OUT:
            low_index = index if LOW_NHWC else e
            store(low_ptr, base, low_index, x_prev, live, n, plane, CHANNELS, channel, LOW_ACCESS)


class PSampleFlags(NamedTuple):
    """The compile-time flags that do not follow from which tensors are given."""

    clip: bool = False
    learned: bool = False
    guided: bool = False
    use_m: bool = False
    use_prev: bool = False
    m_nhwc: bool = False
    low_nhwc: bool = False


DEFAULT_FLAGS = PSampleFlags()


class Geometry(NamedTuple):
    """How a shape is launched: a pure function of it, so that a variant can be compiled and run anywhere."""

    plane: int
    groups: int
    channels: int
    repeat: int
    grid: tuple[int, int, int]


def geometry(batch: int, n: int, channels: int, flags: PSampleFlags, aligned: bool) -> Geometry:
    """Counts and grid for ``batch`` samples of n elements, of which ``channels`` matter only if channels-last."""
    nhwc = flags.m_nhwc or flags.low_nhwc
    channels = channels if nhwc else 1
    plane = n // channels // 4 if aligned else n // channels
    groups = plane if aligned else -(-n // 4)
    repeat = 1 if nhwc and aligned else repeats(batch, groups)
    return Geometry(plane, groups, channels, repeat, launch_grid(batch, groups, repeat))


def _constants(
    flags: PSampleFlags, geom: Geometry, aligned: bool, noise: int, x0_out: bool, low_out: bool
) -> dict[str, object]:
    constants: dict[str, object] = {name.upper(): value for name, value in flags._asdict().items()}
    constants |= {"X0_OUT": x0_out, "LOW_OUT": low_out, "NOISE": noise, "CHANNELS": geom.channels}
    return constants | launch.tile_constants(geom.groups, aligned)


def launch_p_sample(
    x_t: Tensor,
    m: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Words | Tensor | None,
    out: Tensor,
    *,
    channels: int = 1,
    flags: PSampleFlags = DEFAULT_FLAGS,
    x0_prev: Tensor | None = None,
    x0_out: Tensor | None = None,
    low_out: Tensor | None = None,
) -> None:
    """Execute one row of a table for each sample.

    Args:
        x_t, out, x0_prev, x0_out, z: contiguous [B, n].
        m, low_out: dense storage of the network's output and of the copy, laid out as the flags say.
        rows: float32 [R, 14] contiguous; row: int64 [B] or [1].
        channels: of x_t; needed if something is channels-last.
    """
    batch, n = x_t.shape
    if x_t.numel() == 0:
        return
    given = noise if isinstance(noise, Tensor) else None
    keys: Any = (None, None, None, 0) if noise is None or given is not None else noise
    kind = launch.NOISE_NONE if noise is None else launch.NOISE_COUNTER if given is None else launch.NOISE_GIVEN
    nhwc = flags.m_nhwc or flags.low_nhwc
    aligned = is_aligned(n // channels if nhwc else n, x_t, m, given, x0_prev, out, x0_out, low_out)
    geom = geometry(batch, n, channels, flags, aligned)
    strides = [0 if v is None else sample_stride(v, batch) for v in (row, *keys[:3])]
    with on_device(x_t):
        _p_sample_kernel[geom.grid](
            x_t, m, given, x0_prev, out, x0_out, low_out, rows, row, *keys[:3],
            batch, geom.plane, geom.repeat, *strides, keys[3],
            **_constants(flags, geom, aligned, kind, x0_out is not None, low_out is not None), **OPTIONS,
        )  # fmt: skip


def p_sample_variant(
    n: int,
    channels: int = 1,
    *,
    flags: PSampleFlags = DEFAULT_FLAGS,
    x: torch.dtype = torch.float32,
    m: torch.dtype | None = None,
    noise: int = launch.NOISE_COUNTER,
    z: torch.dtype = torch.float32,
    x0_out: torch.dtype | None = None,
    low_out: torch.dtype | None = None,
    aligned: bool | None = None,
) -> Variant:
    """The variant that :func:`launch_p_sample` runs for samples of n elements; m has x's dtype unless told."""
    nhwc = flags.m_nhwc or flags.low_nhwc
    aligned = (n // channels if nhwc else n) % 4 == 0 if aligned is None else aligned
    geom = geometry(1, n, channels, flags, aligned)
    key = torch.int64 if noise == launch.NOISE_COUNTER else None
    types = {"x_ptr": x, "m_ptr": m or x, "z_ptr": z if noise == launch.NOISE_GIVEN else None}
    types |= {"x0_prev_ptr": x if flags.use_prev else None, "out_ptr": x, "x0_out_ptr": x0_out, "low_ptr": low_out}
    types |= {"rows_ptr": torch.float32, "row_ptr": torch.int64, "seed_ptr": key, "id_ptr": key, "step_ptr": key}
    constants = _constants(flags, geom, aligned, noise, x0_out is not None, low_out is not None)
    return make_variant(_p_sample_kernel, types, constants)
