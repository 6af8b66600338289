"""The fused operations executed by the Triton kernels, into tensors that the caller brings.

Kernels take contiguous samples, and a network output or low-precision copy that is contiguous or channels-last.
Anything else is copied on the way in or out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastddpm.kernels import noise as noise_kernel
from fastddpm.kernels import p_sample as p_sample_kernel
from fastddpm.kernels import q_sample as q_sample_kernel
from fastddpm.kernels.launch import Keys
from fastddpm.noise import Counter
from fastddpm.step import Flags


def _flat(x: Tensor) -> Tensor:
    """[B, ...] as contiguous [B, n]."""
    return x.contiguous().view(x.shape[0], -1)


def _noise(noise: Counter | Tensor) -> Keys | Tensor:
    if isinstance(noise, Counter):
        return Keys(noise.seed, noise.sample_id, noise.step, noise.stream)
    return _flat(noise)


def _is_channels_last(x: Tensor) -> bool:
    """Whether x [B, C, ...] is dense with its channels innermost, and not contiguous as well."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


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
    m_nhwc, low_nhwc = _is_channels_last(m), low_out is not None and _is_channels_last(low_out)
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
