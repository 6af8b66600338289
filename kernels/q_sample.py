"""The forward process: q(x_t | x_0), or q(x_t | x_{t-1}), in one pass over memory.

``fastddpm/ops/twins.py`` is the twin.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastddpm.kernels.launch import (
    SCALAR,
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

RUNTIME = (
    "x_ptr", "noise_ptr", "out_ptr", "eps_out_ptr", "keep_ptr", "rows_ptr", "row_ptr", "seed_ptr", "id_ptr", "step_ptr",
    "batch", "count", "row_stride", "seed_stride", "id_stride", "step_stride", "stream",
)  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def _q_sample_kernel(
    x_ptr, noise_ptr, out_ptr, eps_out_ptr, keep_ptr, rows_ptr, row_ptr, seed_ptr, id_ptr, step_ptr,
    batch, count, row_stride, seed_stride, id_stride, step_stride, stream,
    ALIGNED: tl.constexpr, BLOCK_G: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x_t = c_x * x_0 + sigma * eps   (Ho et al. 2020, eq. 4; with the rows of q_step, eq. 2).

    Inputs    x_0, noise: [batch, n] contiguous, fp32/fp16/bf16; rows: [R, 2] fp32; row, seed, sample_id, step: int64,
              stride 1 per sample or 0 for all; keep: [batch, n] uint8
    Output    x_t: [batch, n], only where keep is 0 if it is passed; eps if its tensor is
    Grid      ``launch_grid``; count: n in groups of four (in elements if not ALIGNED)
    Traffic   1 read + 1 write = 8 B/element at fp32, 12 with eps returned; 9 with keep
    Numerics  fp32 inside, no contraction, one rounding at each store; bit-equal to ``twins.q_sample``
    Noise     noise-v1 if a seed is passed, else the caller's eps
    """
    ACCESS: tl.constexpr = VECTOR if ALIGNED else SCALAR
    n = count.to(tl.int64)
    groups = count
    if ALIGNED:
        n = n * 4
    else:
        groups = (n + 3) // 4
    s, exists = tile_samples(batch, BLOCK_G, TILE)
    g, live = tile_groups(program(), groups, BLOCK_G, TILE)
    live = live & exists
    base = s.to(tl.int64) * n
    index = g.to(tl.int64) * 4
    row = rows_ptr + tl.load(row_ptr + s * row_stride) * 2
    c_x = per_row(tl.load(row), BLOCK_G, TILE)
    sigma = per_row(tl.load(row + 1), BLOCK_G, TILE)
    x = load(x_ptr, base, index, live, n, n, 1, 0, ACCESS)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr + s * seed_stride)
        sample_id = tl.load(id_ptr + s * id_stride)
        eps = normals4(seed, sample_id, tl.load(step_ptr + s * step_stride), stream, g)
    else:
        eps = load(noise_ptr, base, index, live, n, n, 1, 0, ACCESS)
    x_t = c_x * x + sigma * eps
    if keep_ptr is not None:
        # As a mask of vectors it would send the values through shared memory.
        k0, k1, k2, k3 = split4(load(keep_ptr, base, index, live, n, n, 1, 0, ACCESS))
        x0, x1, x2, x3 = split4(x_t.to(out_ptr.dtype.element_ty))
        p = out_ptr + (base + index)
        tl.store(p, x0, mask=live & (k0 == 0))
        tl.store(p + 1, x1, mask=live & (k1 == 0) & (index + 1 < n))
        tl.store(p + 2, x2, mask=live & (k2 == 0) & (index + 2 < n))
        tl.store(p + 3, x3, mask=live & (k3 == 0) & (index + 3 < n))
    else:
        store(out_ptr, base, index, x_t, live, n, n, 1, 0, ACCESS)
    if eps_out_ptr is not None:
        store(eps_out_ptr, base, index, eps, live, n, n, 1, 0, ACCESS)


def q_sample_launch(
    x_0: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Words | Tensor,
    out: Tensor,
    eps_out: Tensor | None = None,
    keep: Tensor | None = None,
) -> Launch:
    """Fill ``out`` with x_t, but for what ``keep`` keeps, and ``eps_out`` with the noise if given.

    Args:
        x_0, out, eps_out: contiguous [B, ...], at least one element; eps likewise, if given.
        keep: bool, likewise: where it is true, ``out`` stays.
        rows: float32 [R, 2] contiguous; row: int64 [B] or [1].
    """
    batch, n = len(x_0), x_0.shape[1:].numel()
    given = noise if isinstance(noise, Tensor) else None
    count, groups, tile = cover(n, 1, x_0, given, out, eps_out, keep)
    words, strides, stream = split_words(noise, batch)
    kept = None if keep is None else keep.view(torch.uint8)
    tensors = (x_0, given, out, eps_out, kept, rows, row, *words)
    values = (*tensors, batch, count, sample_stride(row, batch), *strides, stream)
    return Launch(_q_sample_kernel, launch_grid(batch, groups), values, tile)
