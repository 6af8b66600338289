"""The fused operations executed by the Triton kernels, into tensors that the caller brings.

One function for each twin, with its arguments. Kernels take contiguous samples, and a network output or low-precision
copy that is contiguous or channels-last. Anything else is copied on the way in or out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm.kernels import ddpm_loss as ddpm_loss_kernel
from fastddpm.kernels import noise as noise_kernel
from fastddpm.kernels import p_sample as p_sample_kernel
from fastddpm.kernels import q_sample as q_sample_kernel
from fastddpm.noise.v1 import Counter
from fastddpm.ops.memory import is_channels_last
from fastddpm.ops.twins import Flags

Targets = tuple[Tensor | None, ...]


def _flat(x: Tensor) -> Tensor:
    """[B, ...] as contiguous [B, n]."""
    return x.contiguous().view(x.shape[0], -1)


def _noise(noise: Counter | Tensor | None) -> Any:
    return _flat(noise) if isinstance(noise, Tensor) else noise


def _dense(m: Tensor) -> Tensor:
    return m if is_channels_last(m) else m.contiguous()


def _scratch(target: Tensor | None, dense: bool) -> Tensor | None:
    """Where the kernel writes: the target itself, or contiguous memory to be copied from."""
    return target if target is None or dense else torch.empty_like(target, memory_format=torch.contiguous_format)


def randn(targets: tuple[Tensor], counter: Counter, n: int) -> None:
    """Fill contiguous [B, n] with noise-v1."""
    noise_kernel.launch_randn(targets[0], counter)


def q_sample(targets: Targets, x_0: Tensor, rows: Tensor, row: Tensor, noise: Counter | Tensor) -> None:
    """Fill contiguous (x_t, eps)."""
    if x_0.numel() == 0:
        return
    x = _flat(x_0)
    out, eps = (None if t is None else t.view(x.shape) for t in targets)
    assert out is not None
    q_sample_kernel.launch_q_sample(x, rows.contiguous(), row.contiguous(), _noise(noise), out, eps)


def p_sample(
    targets: Targets,
    x_t: Tensor,
    m: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Counter | Tensor | None,
    flags: Flags,
    history: tuple[Tensor, ...],
) -> None:
    """Fill (x_prev, x0, a copy of x_prev)."""
    if x_t.numel() == 0:
        return
    x = _flat(x_t)
    out, x0_out, low_out = targets
    m_nhwc, low_nhwc = is_channels_last(m), low_out is not None and is_channels_last(low_out)
    x_prev, x0 = (_scratch(t, t is not None and t.is_contiguous()) for t in (out, x0_out))
    low = _scratch(low_out, low_nhwc or (low_out is not None and low_out.is_contiguous()))
    assert x_prev is not None
    p_sample_kernel.launch_p_sample(
        x,
        _dense(m),
        rows.contiguous(),
        row.contiguous(),
        _noise(noise),
        x_prev.view(x.shape),
        channels=x_t.shape[1] if x_t.dim() > 1 else 1,
        flags=p_sample_kernel.PSampleFlags(*flags, m_nhwc=m_nhwc, low_nhwc=low_nhwc),
        x0_prev=_flat(history[0]) if history else None,
        x0_out=None if x0 is None else x0.view(x.shape),
        low_out=low,
    )
    for target, written in zip(targets, (x_prev, x0, low), strict=True):
        if target is not None and written is not None and written is not target:
            target.copy_(written)


def squares(
    targets: tuple[Tensor],
    m: Tensor,
    x_0: Tensor | None,
    rows: Tensor,
    row: Tensor,
    noise: Counter | None,
    learned: bool,
) -> None:
    """Fill float64 [B] with each sample's sum of squared residuals."""
    if m.numel() == 0:
        targets[0].zero_()
    else:
        torch.sum(_loss(m, x_0, rows, row, noise, learned), dim=1, dtype=torch.float64, out=targets[0])


def scaled_residual(
    targets: tuple[Tensor],
    m: Tensor,
    x_0: Tensor | None,
    rows: Tensor,
    row: Tensor,
    noise: Counter | None,
    learned: bool,
    scale: Tensor,
) -> None:
    """Fill what the loss reads of a tensor like ``empty_as(m)`` with scale [B] times the residuals."""
    if m.numel():
        _loss(m, x_0, rows, row, noise, learned, scale.contiguous(), targets[0])


def _loss(
    m: Tensor,
    x_0: Tensor | None,
    rows: Tensor,
    row: Tensor,
    noise: Counter | None,
    learned: bool,
    scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    m_nhwc = is_channels_last(m)
    return ddpm_loss_kernel.launch_ddpm_loss(
        _dense(m),
        None if x_0 is None else _flat(x_0),
        rows.contiguous(),
        row.contiguous(),
        noise,
        batch=m.shape[0],
        channels=m.shape[1] // (2 if learned else 1) if m_nhwc else 1,
        learned=learned,
        m_nhwc=m_nhwc,
        scale=scale,
        out=out,
    )
