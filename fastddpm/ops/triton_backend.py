"""The fused operations executed by the Triton kernels, into tensors that the caller brings.

One function for each twin, with its arguments. Kernels take contiguous samples, and a network output or low-precision
copy that is contiguous or channels-last. Anything else is copied on the way in or out.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from fastddpm.kernels.ddpm_loss import ddpm_loss_launch
from fastddpm.kernels.noise import randn_launch
from fastddpm.kernels.p_sample import p_sample_launch
from fastddpm.kernels.q_sample import q_sample_launch
from fastddpm.noise.v1 import Counter
from fastddpm.ops.checks import is_channels_last
from fastddpm.ops.twins import Flags

Targets = tuple[Tensor | None, ...]
T = TypeVar("T")


def _dense(value: T) -> T:
    """A tensor, or those of a counter, as contiguous memory."""
    if isinstance(value, Counter):
        seed, sample_id, step, stream = value
        return Counter(seed.contiguous(), sample_id.contiguous(), step.contiguous(), stream)  # type: ignore[return-value]
    return value.contiguous() if isinstance(value, Tensor) else value  # type: ignore[return-value]


def _dense_or_nhwc(m: Tensor) -> Tensor:
    return m if is_channels_last(m) else m.contiguous()


def _scratch(target: Tensor | None, nhwc: bool = False) -> Tensor | None:
    """Where the kernel writes: the target itself, or contiguous memory to be copied from."""
    if target is None or target.is_contiguous() or (nhwc and is_channels_last(target)):
        return target
    return torch.empty_like(target, memory_format=torch.contiguous_format)


def randn(targets: tuple[Tensor], counter: Counter, n: int) -> None:
    """Fill contiguous [B, n] with noise-v1."""
    if targets[0].numel():
        randn_launch(targets[0], _dense(counter)).run()


def q_sample(
    targets: Targets,
    x_0: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Counter | Tensor,
    keep: Tensor | None = None,
    _: Tensor | None = None,
) -> None:
    """Fill contiguous (x_t, eps); x_t only where keep is False."""
    if x_0.numel():
        q_sample_launch(*map(_dense, (x_0, rows, row, noise)), *targets, _dense(keep)).run()


def p_sample(
    targets: Targets,
    x_t: Tensor,
    m: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Counter | Tensor | None,
    flags: Flags,
    history: Tensor | None,
) -> None:
    """Fill (x_prev, x0, a copy of x_prev), and the oldest slot of the history."""
    if x_t.numel() == 0:
        return
    ring = _dense(history)
    x_prev, x0, low = _scratch(targets[0]), _scratch(targets[1]), _scratch(targets[2], nhwc=True)
    p_sample_launch(
        _dense(x_t),
        _dense_or_nhwc(m),
        *map(_dense, (rows, row, noise)),
        x_prev,
        ring=ring,
        x0_out=x0,
        low_out=low,
        **flags._asdict(),
    ).run()
    for target, written in zip((*targets, history), (x_prev, x0, low, ring), strict=True):
        if target is not None and written is not None and written is not target:
            target.copy_(written)


def squares(targets: tuple[Tensor], m: Tensor, *arguments: Any) -> None:
    """Fill float64 [B] with each sample's sum of squared residuals."""
    if m.numel() == 0:
        targets[0].zero_()
    else:
        launch, sums = ddpm_loss_launch(_dense_or_nhwc(m), *map(_dense, arguments))
        launch.run()
        torch.sum(sums, dim=1, dtype=torch.float64, out=targets[0])


def scaled_residual(targets: tuple[Tensor], m: Tensor, *arguments: Any) -> None:
    """Fill what the loss reads of a tensor like ``empty_as(m)`` with scale [B] times the residuals."""
    if m.numel():
        ddpm_loss_launch(_dense_or_nhwc(m), *map(_dense, arguments), targets[0])[0].run()
