"""The one door to the fused operations: validates, picks twin or kernel, and hands back tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastddpm import noise as noise_v1
from fastddpm import step as twin
from fastddpm.noise import Counter
from fastddpm.step import Flags

__all__ = ["Counter", "p_sample", "q_sample", "randn"]


def randn(
    counter: Counter,
    shape_per_sample: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    shape = torch.Size(shape_per_sample)
    z = noise_v1.normals(counter.seed, counter.sample_id, counter.step, counter.stream, shape.numel())
    return z.reshape(-1, *shape).to(dtype)


def q_sample(
    x_0: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Counter | Tensor,
    *,
    return_eps: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    x_t, eps = twin.q_sample(x_0, rows, row, noise)
    return (x_t.to(x_0.dtype), eps.to(x_0.dtype)) if return_eps else x_t.to(x_0.dtype)


def p_sample(
    x_t: Tensor,
    m: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Counter | Tensor | None,
    *,
    clip: bool,
    learned: bool = False,
    guided: bool = False,
    use_m: bool = False,
    use_prev: bool = False,
    x0_prev: Tensor | None = None,
    out: Tensor | None = None,
    x0_out: Tensor | None = None,
    low_out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    flags = Flags(clip=clip, learned=learned, guided=guided, use_m=use_m, use_prev=use_prev)
    x_prev, x0 = twin.p_sample(x_t, m, rows, row, noise, flags, x0_prev)
    out = torch.empty(x_t.shape, dtype=x_t.dtype) if out is None else out
    out.copy_(x_prev)
    if x0_out is not None:
        x0_out.copy_(x0)
    if low_out is not None:
        low_out.copy_(x_prev)
    return out
