"""Group normalisation of images with what stands around it: one operation for the UNet's form on a GPU."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from fastddpm.ops.operators import define, use_triton


def group_norm(
    x: Tensor,
    weight: Tensor,
    beta: Tensor,
    groups: int,
    tiny: float,
    *,
    skip: Tensor | None = None,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    time: Tensor | None = None,
    scale_shift: bool = False,
    silu: bool = False,
    keep: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y = silu((u - mean) / sqrt(var + tiny) * weight + beta), u = x + bias + time + residual   (Wu & He 2018, eq. 1).

    The groups are those of u with the channels of skip behind it. The kernel keeps to PyTorch's own accuracy, not to
    its bits: sums have an order of their own.

    Args:
        x: [B, C, H, W]; computed in float32 whatever its dtype.
        weight, beta: [C + S].
        groups: how many.
        tiny: added to the variance.
        skip: [B, S, H, W], in x's dtype.
        residual: [B, C, H, W], in x's dtype.
        bias: [C].
        time: [B, C] or [1, C], or with `scale_shift` twice the channels: scale and shift, which act on the normalised
            values, y * (1 + scale) + shift, before the activation.
        scale_shift: see `time`.
        silu: apply the activation y * sigmoid(y).
        keep: also return u, rounded to x's dtype; it is that which is normalised.
        backend: "auto", "triton" or "torch".

    Returns:
        (y, u), [B, C + S, H, W] and [B, C, H, W], channels-last, in x's dtype; u is empty unless kept.

    Raises:
        ValueError: the groups do not divide the channels, or a sample has 2^31 elements and more.
        BackendUnavailable: "triton" was asked for and cannot run.
    """
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    if channels % groups:
        raise ValueError(f"{groups} groups do not divide {channels} channels")
    if x.shape[2:].numel() * channels >= 1 << 31:
        raise ValueError(f"the kernel counts a sample's elements in 32 bits, got {channels} x {list(x.shape[2:])}")
    return _group_norm(x, weight, beta, groups, tiny, skip, residual, bias, time, scale_shift, silu, keep, backend)


def _empty(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, _, *plane = x.shape
    y, kept = (
        torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for shape in ((batch, len(weight), *plane), x.shape if rest[-2] else (0, *x.shape[1:]))
    )
    return y, kept


def _run(
    x: Tensor,
    weight: Tensor,
    beta: Tensor,
    groups: int,
    tiny: float,
    skip: Tensor | None,
    residual: Tensor | None,
    bias: Tensor | None,
    time: Tensor | None,
    scale_shift: bool,
    silu: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if not use_triton(backend, x.device):
        return _twin(x, weight, beta, groups, tiny, skip, residual, bias, time, scale_shift, silu, keep)
    y, kept = _empty(x, weight, keep, backend)
    if x.numel():
        x = x.contiguous(memory_format=torch.channels_last)
        skip, residual = (
            None if t is None else t.contiguous(memory_format=torch.channels_last) for t in (skip, residual)
        )
        for launch in importlib.import_module("fastddpm.kernels.group_norm").group_norm_launches(
            x, weight, beta, y, groups, tiny, skip=skip, residual=residual, bias=bias, time=time,
            scale_shift=scale_shift, silu=silu, sum_out=kept if keep else None,
        ):  # fmt: skip
            launch.run()
    return y, kept


def _twin(
    x: Tensor,
    weight: Tensor,
    beta: Tensor,
    groups: int,
    tiny: float,
    skip: Tensor | None,
    residual: Tensor | None,
    bias: Tensor | None,
    time: Tensor | None,
    scale_shift: bool,
    silu: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The kernel's operations in its order, but for that of the sums; float64 stays float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    added = x.new_zeros((1, x.shape[1]), dtype=wide)
    if bias is not None:
        added = added + bias.to(wide)
    if time is not None and not scale_shift:
        added = added + time.to(wide)
    u = x.to(wide) + added[:, :, None, None]
    if residual is not None:
        u = u + residual.to(wide)
    kept = u.to(x.dtype) if keep else x.new_empty((0, *x.shape[1:]))
    if keep:
        u = kept.to(wide)
    if skip is not None:
        u = torch.cat([u, skip.to(wide)], dim=1)
    in_groups = u.reshape(len(u), groups, -1)
    left = in_groups - in_groups.mean(dim=2, keepdim=True)
    scale, shift = weight.to(wide)[None], beta.to(wide)[None]
    if time is not None and scale_shift:
        factor, more = time.to(wide).chunk(2, dim=1)
        scale, shift = scale * (1 + factor), shift * (1 + factor) + more
    inverse = 1 / ((left * left).mean(dim=2) + tiny).sqrt()
    scale = inverse.repeat_interleave(u.shape[1] // groups, dim=1) * scale
    y = left.view(u.shape) * scale[:, :, None, None] + shift[:, :, None, None]
    if silu:
        y = y / (1 + torch.exp2(y * -math.log2(math.e)))
    return tuple(t.to(x.dtype).contiguous(memory_format=torch.channels_last) for t in (y, kept))  # type: ignore[return-value]


_group_norm = define(
    "group_norm(Tensor x, Tensor weight, Tensor beta, int groups, float tiny, Tensor? skip, Tensor? residual, "
    "Tensor? bias, Tensor? time, bool scale_shift, bool silu, bool keep, str backend) -> (Tensor, Tensor)",
    _run,
    _empty,
)
