"""noise-v1 on the device: Philox4x32-10 and Box-Muller, and the kernel that stores a draw.

The contract (counter words, constants and their fits) is in ``fastddpm/noise/v1.py``, the twin of this file.
Allowed operations: integer ops, integer-to-float casts, float32 add, sub and mul, selects, bit casts; compile with
``enable_fp_fusion=False``, since a contracted multiply-add would change bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastddpm.kernels.launch import (
    SCALAR,
    VECTOR,
    Launch,
    Words,
    cover,
    join4,
    launch_grid,
    program,
    split_words,
    store,
    tile_groups,
    tile_samples,
)
from torch import Tensor

PHILOX_M0 = tl.constexpr(0xD2511F53)
PHILOX_M1 = tl.constexpr(0xCD9E8D57)
PHILOX_W0 = tl.constexpr(0x9E3779B9)
PHILOX_W1 = tl.constexpr(0xBB67AE85)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
TWO_TO_32 = tl.constexpr(32 << 23)
LOG2_POLY = tl.constexpr(
    (-12102201.0, 6051177.5, -4034407.0, 3020791.75, -2405217.0, 2096296.75, -1986009.625, 1225211.125)
)
SIN_POLY = tl.constexpr(
    (
        float.fromhex("0x1.b2049ap-13"),
        float.fromhex("0x1.b20492p-14"),
        float.fromhex("0x1.ce537cp-17"),
        float.fromhex("0x1.c4238ep-21"),
        float.fromhex("0x1.0bc3e6p-25"),
    )
)
COS_POLY = tl.constexpr(
    (
        float.fromhex("0x1.b2049ap-13"),
        float.fromhex("-0x1.0bb95ep-12"),
        float.fromhex("0x1.b86318p-15"),
        float.fromhex("-0x1.21b9bcp-18"),
        float.fromhex("0x1.96cbfep-23"),
        float.fromhex("-0x1.448738p-28"),
    )
)


@triton.jit
def horner(x, C: tl.constexpr, N: tl.constexpr):
    """Evaluate a polynomial of N coefficients, lowest first, each product and sum rounded on its own."""
    p = x * C[N - 1] + C[N - 2]
    for k in tl.static_range(N - 2):
        p = p * x + C[N - 3 - k]
    return p


@triton.jit
def _mul_wide(a, M: tl.constexpr):
    """High and low word of a 32 x 32 bit product: one wide multiply."""
    p = a.to(tl.uint64) * M
    return (p >> 32).to(tl.uint32), p.to(tl.uint32)


@triton.jit
def philox(seed, sample_id, step, stream, g):
    """Philox4x32-10 of the counter (g, step, sample_id, stream) under the int64 key ``seed``: four uint32 words."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = g
    c1 = step.to(tl.uint32)
    c2 = sample_id.to(tl.uint32)
    c3 = stream
    for _ in tl.static_range(10):
        h0, l0 = _mul_wide(c0, PHILOX_M0)
        h1, l1 = _mul_wide(c2, PHILOX_M1)
        c0 = h1 ^ c1 ^ k0
        c1 = l1
        c2 = h0 ^ c3 ^ k1
        c3 = l0
        k0 = k0 + PHILOX_W0
        k1 = k1 + PHILOX_W1
    return c0, c1, c2, c3


@triton.jit
def _box_muller(r_radius, r_angle):
    """Two independent normals from two uint32 words."""
    bits = (r_radius | 1).to(tl.float32).to(tl.int32, bitcast=True) - (SQRT_HALF_BITS + TWO_TO_32)
    exponent = bits & -0x800000
    f = (bits - exponent + SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    h = f * horner(f, LOG2_POLY, 8) - exponent.to(tl.float32)
    # Literals, since a constexpr on the left of a minus sign does not reach the tensor in Triton's interpreter.
    y = (0x5EFEE100 - (h.to(tl.int32, bitcast=True) >> 1)).to(tl.float32, bitcast=True)
    y = y * (1.6179287433624268 - (h * y) * y)
    y = y * (1.8823297023773193 - (h * y) * y)
    q = h * y
    rho = q * (2.9641799926757812 - q * y)
    v = (r_angle << 1).to(tl.int32, bitcast=True).to(tl.float32) * (2.0**-31)
    t = v * v
    sin = horner(1.0 - t, SIN_POLY, 5) * v
    cos = horner(t, COS_POLY, 6)
    cos = (cos.to(tl.uint32, bitcast=True) ^ (r_angle & 0x80000000)).to(tl.float32, bitcast=True)
    return rho * cos, rho * sin


@triton.jit
def normals4(seed, sample_id, step, stream, g):
    """The normals 4g .. 4g + 3 of every group in ``g`` (uint32 [T]), float32 [T, 4] in element order."""
    r0, r1, r2, r3 = philox(seed, sample_id, step, stream, g)
    n0, n1 = _box_muller(r0, r1)
    n2, n3 = _box_muller(r2, r3)
    return join4(n0, n1, n2, n3)


RUNTIME = (
    "out_ptr", "seed_ptr", "id_ptr", "step_ptr",
    "batch", "count", "seed_stride", "id_stride", "step_stride", "stream",
)  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def _randn_kernel(
    out_ptr, seed_ptr, id_ptr, step_ptr, batch, count, seed_stride, id_stride, step_stride, stream,
    ALIGNED: tl.constexpr, BLOCK_G: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store the first n normals of noise-v1 of each sample.

    Inputs    seed, sample_id, step: int64, stride 1 per sample or 0 for all
    Output    out: [batch, n] contiguous, fp32/fp16/bf16
    Grid      ``launch_grid``; count: n in groups of four (in elements if not ALIGNED)
    Traffic   1 write = 4 B/element at fp32; about 50 instructions an element, so issue binds inside the L2
    Numerics  bit-equal to ``fastddpm/noise/v1.py``
    """
    n = count.to(tl.int64)
    groups = count
    if ALIGNED:
        n = n * 4
    else:
        groups = (n + 3) // 4
    s, exists = tile_samples(batch, BLOCK_G, TILE)
    g, live = tile_groups(program(), groups, BLOCK_G, TILE)
    seed = tl.load(seed_ptr + s * seed_stride)
    sample_id = tl.load(id_ptr + s * id_stride)
    step = tl.load(step_ptr + s * step_stride)
    z = normals4(seed, sample_id, step, stream, g)
    base = s.to(tl.int64) * n
    store(out_ptr, base, g.to(tl.int64) * 4, z, live & exists, n, n, 1, 0, VECTOR if ALIGNED else SCALAR)


def randn_launch(out: Tensor, noise: Words) -> Launch:
    """Fill ``out``, contiguous [B, n] of at least one element, with noise-v1."""
    batch, n = out.shape
    count, groups, tile = cover(n, 1, out)
    words, strides, stream = split_words(noise, batch)
    values = (out, *words, batch, count, *strides, stream)
    return Launch(_randn_kernel, launch_grid(batch, groups), values, tile)
