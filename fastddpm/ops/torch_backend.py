"""The fused operations executed by their twins, into tensors that the caller brings; the counterpart of triton_backend.

The twin runs eagerly, or compiled by Inductor with the same bits: about ten times faster on a CPU once the compilation
(10-20 s) is paid.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastddpm.machine.torch_compile import Compiled, own_code
from fastddpm.noise.v1 import MAX_ELEMENTS, Counter, fill_pairs, normals
from fastddpm.ops import twins as twin
from fastddpm.ops.twins import Flags


def randn(out: Tensor, counter: Counter, compiled: bool = False) -> None:
    """Fill ``out`` [B, n] with noise-v1."""
    if compiled and _holds_pairs(out):
        run, target = _choose(fill_pairs, compiled), out.view(torch.int64)
    else:
        run, target = _choose(_randn, compiled, out.dtype), out
    run(target, counter.seed, counter.sample_id, counter.step, counter.stream)


def q_sample(
    x_0: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Counter | Tensor,
    out: Tensor,
    eps_out: Tensor | None,
    compiled: bool = False,
) -> None:
    """Fill ``out`` with x_t, and ``eps_out`` with the noise if given."""
    run = _choose(_q_sample, compiled, x_0.dtype, type(noise), eps_out is None)
    run(x_0, rows, row, noise, out, eps_out)


def p_sample(
    x_t: Tensor,
    m: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Counter | Tensor | None,
    flags: Flags,
    x0_prev: Tensor | None,
    out: Tensor,
    x0_out: Tensor | None,
    low_out: Tensor | None,
    compiled: bool = False,
) -> None:
    """Fill ``out`` with x_prev, and ``x0_out`` and ``low_out`` if given."""
    targets = (out, x0_out, low_out)
    dtypes = tuple(None if t is None else t.dtype for t in targets)
    run = _choose(_p_sample, compiled, x_t.dtype, m.dtype, type(noise), flags, dtypes)
    run(x_t, m, rows, row, noise, flags, x0_prev, targets)


def ddpm_loss(
    m: Tensor,
    x_0: Tensor | None,
    rows: Tensor,
    row: Tensor,
    noise: Counter | None,
    learned: bool,
    compiled: bool = False,
) -> Tensor:
    """Sum the squared residuals of each sample: [B], float64."""
    run = _choose(_squares, compiled, *_loss_key(m, x_0, noise, learned))
    return run(m, x_0, rows, row, noise, learned)


def ddpm_loss_gradient(
    m: Tensor,
    x_0: Tensor | None,
    rows: Tensor,
    row: Tensor,
    noise: Counter | None,
    learned: bool,
    scale: Tensor,
    out: Tensor,
    compiled: bool = False,
) -> None:
    """Fill ``out``, of m's shape, with scale [B] times the residuals; a half that the loss does not read stays."""
    run = _choose(_scaled_residual, compiled, *_loss_key(m, x_0, noise, learned))
    half = out.chunk(2, dim=1)[0] if learned else out
    half.copy_(run(m, x_0, rows, row, noise, learned, scale))


def _holds_pairs(out: Tensor) -> bool:
    """Whether `fill_pairs` can write into contiguous ``out``."""
    n, offset = out.shape[1], int(out.storage_offset())
    pairs = out.numel() > 0 and n % 2 == 0 and n <= MAX_ELEMENTS and offset % 2 == 0
    return bool(pairs) and out.dtype == torch.float32 and sys.byteorder == "little"


def _randn(out: Tensor, seed: Tensor, sample_id: Tensor, step: Tensor, stream: int) -> None:
    out.copy_(normals(seed, sample_id, step, stream, out.shape[1]))


def _q_sample(
    x_0: Tensor, rows: Tensor, row: Tensor, noise: Counter | Tensor, out: Tensor, eps_out: Tensor | None
) -> None:
    x_t, eps = twin.q_sample(x_0, rows, row, noise)
    out.copy_(x_t)
    if eps_out is not None:
        eps_out.copy_(eps)


def _p_sample(
    x_t: Tensor,
    m: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Counter | Tensor | None,
    flags: Flags,
    x0_prev: Tensor | None,
    targets: tuple[Tensor | None, ...],
) -> None:
    x_prev, x0 = twin.p_sample(x_t, m, rows, row, noise, flags, () if x0_prev is None else (x0_prev,))
    for target, result in zip(targets, (x_prev, x0, x_prev), strict=True):
        if target is not None:
            target.copy_(result)


def _loss_key(m: Tensor, x_0: Tensor | None, noise: Counter | None, learned: bool) -> tuple[Any, ...]:
    return m.dtype, None if x_0 is None else x_0.dtype, noise is None, learned


def _squares(m: Tensor, x_0: Tensor | None, rows: Tensor, row: Tensor, noise: Counter | None, learned: bool) -> Tensor:
    r = twin.residual(m, x_0, rows, row, noise, learned)
    return (r * r).flatten(1).sum(dim=1, dtype=torch.float64)


def _scaled_residual(
    m: Tensor, x_0: Tensor | None, rows: Tensor, row: Tensor, noise: Counter | None, learned: bool, scale: Tensor
) -> Tensor:
    r = twin.residual(m, x_0, rows, row, noise, learned)
    return scale.reshape(-1, *(1,) * (r.dim() - 1)) * r


def _choose(function: Callable[..., Any], compiled: bool, *key: Any) -> Callable[..., Any]:
    if not compiled:
        return function
    from fastddpm.machine import torch_compile

    return _compile(function, key) if torch_compile.has_cpp_compiler() else function


@functools.cache
def _compile(function: Any, key: Any) -> Callable[..., Any]:
    """One compiled function per key."""
    return Compiled(own_code(function), strict=False, dynamic=True, name="the fused operation")
