"""The forward process: q(x_t | x_0), or q(x_t | x_{t-1}), in one pass over memory.

``fastddpm/ops/twins.py`` is the twin; :func:`q_sample_variant` describes every variant for offline compilation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastddpm.kernels.launch import (
    OPTIONS,
    Variant,
    Words,
    is_aligned,
    make_variant,
    on_device,
    sample_stride,
    tile_constants,
)
from fastddpm.kernels.noise import normals4
from fastddpm.kernels.tiles import SCALAR, VECTOR, launch_grid, load, per_row, program, store, tile_groups, tile_samples
from torch import Tensor

RUNTIME = (
    "x_ptr", "noise_ptr", "out_ptr", "eps_out_ptr", "rows_ptr", "row_ptr", "seed_ptr", "id_ptr", "step_ptr",
    "batch", "count", "row_stride", "seed_stride", "id_stride", "step_stride", "stream",
)  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def _q_sample_kernel(
    x_ptr, noise_ptr, out_ptr, eps_out_ptr, rows_ptr, row_ptr, seed_ptr, id_ptr, step_ptr,
    batch, count, row_stride, seed_stride, id_stride, step_stride, stream,
    EPS_OUT: tl.constexpr, COUNTER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_G: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x_t = c_x * x_0 + sigma * eps   (Ho et al. 2020, eq. 4; with the rows of q_step, eq. 2).

    Inputs    x_0, noise: [batch, n] contiguous, fp32/fp16/bf16; rows: [R, 2] fp32; row, seed, sample_id, step: int64,
              stride 1 per sample or 0 for all
    Output    x_t: [batch, n]; eps if EPS_OUT
    Grid      ``tiles.launch_grid``; count: n in groups of four (in elements if not ALIGNED)
    Traffic   1 read + 1 write = 8 B/element at fp32, 12 with eps returned
    Numerics  fp32 inside, no contraction, one rounding at each store; bit-equal to ``step.q_sample``
    Noise     noise-v1 if COUNTER, else the caller's eps
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
    if COUNTER:
        seed = tl.load(seed_ptr + s * seed_stride)
        sample_id = tl.load(id_ptr + s * id_stride)
        eps = normals4(seed, sample_id, tl.load(step_ptr + s * step_stride), stream, g)
    else:
        eps = load(noise_ptr, base, index, live, n, n, 1, 0, ACCESS)
    store(out_ptr, base, index, c_x * x + sigma * eps, live, n, n, 1, 0, ACCESS)
    if EPS_OUT:
        store(eps_out_ptr, base, index, eps, live, n, n, 1, 0, ACCESS)


def _constants(n: int, aligned: bool, counter: bool, eps_out: bool) -> dict[str, object]:
    return {"EPS_OUT": eps_out, "COUNTER": counter} | tile_constants(-(-n // 4), aligned)


def launch_q_sample(
    x_0: Tensor, rows: Tensor, row: Tensor, noise: Words | Tensor, out: Tensor, eps_out: Tensor | None = None
) -> None:
    """Fill ``out`` with x_t, and ``eps_out`` with the noise if given; all tensors contiguous [B, n]."""
    batch, n = x_0.shape
    if x_0.numel() == 0:
        return
    given = noise if isinstance(noise, Tensor) else None
    aligned, groups = is_aligned(n, x_0, given, out, eps_out), -(-n // 4)
    keys = (None, None, None, 0) if isinstance(noise, Tensor) else noise
    strides = [0 if v is None else sample_stride(v, batch) for v in (row, *keys[:3])]
    with on_device(x_0):
        _q_sample_kernel[launch_grid(batch, groups)](
            x_0, given, out, eps_out, rows, row, *keys[:3], batch, groups if aligned else n, *strides, keys[3],
            **_constants(n, aligned, given is None, eps_out is not None), **OPTIONS,
        )  # fmt: skip


def q_sample_variant(
    n: int,
    *,
    x: torch.dtype = torch.float32,
    noise: torch.dtype | None = None,
    out: torch.dtype | None = None,
    eps_out: torch.dtype | None = None,
    aligned: bool | None = None,
) -> Variant:
    """The variant that :func:`launch_q_sample` runs for samples of n elements; ``noise`` None: drawn in the kernel."""
    key = None if noise is not None else torch.int64
    types = {"x_ptr": x, "noise_ptr": noise, "out_ptr": out or x, "eps_out_ptr": eps_out, "rows_ptr": torch.float32}
    types |= {"row_ptr": torch.int64, "seed_ptr": key, "id_ptr": key, "step_ptr": key}
    aligned = n % 4 == 0 if aligned is None else aligned
    return make_variant(_q_sample_kernel, types, _constants(n, aligned, noise is None, eps_out is not None))
