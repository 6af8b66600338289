"""The fused operations executed by the Triton kernels, into tensors that the caller brings.

Kernels take contiguous samples, and a network output or low-precision copy that is contiguous or channels-last.
Anything else is copied on the way in or out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastddpm.kernels import ddpm_loss as ddpm_loss_kernel
from fastddpm.kernels import noise as noise_kernel
from fastddpm.kernels import p_sample as p_sample_kernel
from fastddpm.kernels import q_sample as q_sample_kernel
from fastddpm.kernels.launch import Keys
from fastddpm.noise.v1 import Counter
from fastddpm.ops.memory import is_channels_last
from fastddpm.ops.twins import Flags


def _flat(x: Tensor) -> Tensor:
    """[B, ...] as contiguous [B, n]."""
    return x.contiguous().view(x.shape[0], -1)


def _noise(noise: Counter | Tensor) -> Keys | Tensor:
    if isinstance(noise, Counter):
        return Keys(noise.seed, noise.sample_id, noise.step, noise.stream)
    return _flat(noise)


def _scratch(target: Tensor | None, dense: bool) -> Tensor | None:
    """Where the kernel writes: the target itself, or contiguous memory to be copied from."""
    return target if target is None or dense else torch.empty_like(target, memory_format=torch.contiguous_format)


def _finish(target: Tensor | None, written: Tensor | None) -> None:
    if target is not None and written is not None and written is not target:
        target.copy_(written)


def randn(out: Tensor, counter: Counter, compiled: bool = False) -> None:
    """Fill contiguous ``out`` [B, n] with noise-v1."""
    noise_kernel.launch_randn(out, Keys(counter.seed, counter.sample_id, counter.step, counter.stream))


def q_sample(
    x_0: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Counter | Tensor,
    out: Tensor,
    eps_out: Tensor | None,
    compiled: bool = False,
) -> None:
    """Fill contiguous ``out`` with x_t, and contiguous ``eps_out`` with the noise if given."""
    if x_0.numel() == 0:
        return
    x, z = _flat(x_0), _noise(noise)
    target, eps = out.view(x.shape), None if eps_out is None else eps_out.view(x.shape)
    q_sample_kernel.launch_q_sample(x, rows.contiguous(), row.contiguous(), z, target, eps)


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
    if x_t.numel() == 0:
        return
    x = _flat(x_t)
    m_nhwc, low_nhwc = is_channels_last(m), low_out is not None and is_channels_last(low_out)
    x_prev, x0 = (_scratch(t, t is not None and t.is_contiguous()) for t in (out, x0_out))
    low = _scratch(low_out, low_nhwc or (low_out is not None and low_out.is_contiguous()))
    assert x_prev is not None
    p_sample_kernel.launch_p_sample(
        x,
        m if m_nhwc else m.contiguous(),
        rows.contiguous(),
        row.contiguous(),
        None if noise is None else _noise(noise),
        x_prev.view(x.shape),
        channels=x_t.shape[1] if x_t.dim() > 1 else 1,
        flags=p_sample_kernel.PSampleFlags(*flags, m_nhwc=m_nhwc, low_nhwc=low_nhwc),
        x0_prev=None if x0_prev is None else _flat(x0_prev),
        x0_out=None if x0 is None else x0.view(x.shape),
        low_out=low,
    )
    for target, written in ((out, x_prev), (x0_out, x0), (low_out, low)):
        _finish(target, written)


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
    if m.numel() == 0:
        return torch.zeros(m.shape[0], dtype=torch.float64, device=m.device)
    sums = _launch_ddpm_loss(m, x_0, rows, row, noise, learned)
    return sums.sum(dim=1, dtype=torch.float64)


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
    """Fill ``out`` = ``empty_as(m)`` with scale [B] times the residuals; a half that the loss does not read stays."""
    if m.numel() == 0:
        return
    _launch_ddpm_loss(m, x_0, rows, row, noise, learned, scale.contiguous(), out)


def _launch_ddpm_loss(
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
    channels = m.shape[1] // (2 if learned else 1) if m_nhwc else 1
    return ddpm_loss_kernel.launch_ddpm_loss(
        m if m_nhwc else m.contiguous(),
        None if x_0 is None else _flat(x_0),
        rows.contiguous(),
        row.contiguous(),
        None if noise is None else Keys(noise.seed, noise.sample_id, noise.step, noise.stream),
        batch=m.shape[0],
        channels=channels,
        learned=learned,
        m_nhwc=m_nhwc,
        scale=scale,
        out=out,
    )
