"""Group normalisation of images with what stands around it: one operation for the UNet's form on a GPU."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddpm.ops import operators as op


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
        keep: also return u with the channels of skip behind it, rounded to x's dtype; it is that which is normalised.
        backend: "auto", "triton" or "torch".

    Returns:
        (y, u), each [B, C + S, H, W], channels-last, in x's dtype; u is empty unless kept.

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


class _Call(NamedTuple):
    """The operator's arguments; see `group_norm`."""

    x: Tensor
    weight: Tensor
    beta: Tensor
    groups: int
    tiny: float
    skip: Tensor | None
    residual: Tensor | None
    bias: Tensor | None
    time: Tensor | None
    scale_shift: bool
    silu: bool
    keep: bool
    backend: str


def _empty(*values: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*values)
    batch, _, *plane = call.x.shape

    def empty(rows: int) -> Tensor:
        shape = (rows, len(call.weight), *plane)
        return torch.empty(shape, dtype=call.x.dtype, device=call.x.device, memory_format=torch.channels_last)

    return empty(batch), empty(batch if call.keep else 0)


def _run(*values: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*values)
    if not op.use_triton(call.backend, call.x.device):
        return _twin(call)
    y, u = _empty(*call)
    if call.x.numel():
        moved = {name: getattr(call, name) for name in ("x", "skip", "residual")}
        channels_last = {n: t.contiguous(memory_format=torch.channels_last) for n, t in moved.items() if t is not None}
        dense = call._replace(**channels_last)
        kernel = importlib.import_module("fastddpm.kernels.group_norm")
        for launch in kernel.group_norm_launches(*dense[:-2], y, u if call.keep else None):
            launch.run()
    return y, u


def _twin(call: _Call) -> tuple[Tensor, Tensor]:
    """The kernel's operations in its order, but for that of the sums; float64 stays float64."""
    x, time = call.x, call.time
    wide = torch.promote_types(x.dtype, torch.float32)
    added = x.new_zeros((1, x.shape[1]), dtype=wide)
    if call.bias is not None:
        added = added + call.bias.to(wide)
    if time is not None and not call.scale_shift:
        added = added + time.to(wide)
    u = x.to(wide) + added[:, :, None, None]
    if call.residual is not None:
        u = u + call.residual.to(wide)
    if call.skip is not None:
        u = torch.cat([u, call.skip.to(wide)], dim=1)
    kept = u.to(x.dtype)
    if call.keep:
        u = kept.to(wide)
    in_groups = u.reshape(len(u), call.groups, -1)
    left = in_groups - in_groups.mean(dim=2, keepdim=True)
    scale, shift = call.weight.to(wide)[None], call.beta.to(wide)[None]
    if time is not None and call.scale_shift:
        factor, more = time.to(wide).chunk(2, dim=1)
        scale, shift = scale * (1 + factor), shift * (1 + factor) + more
    inverse = 1 / ((left * left).mean(dim=2) + call.tiny).sqrt()
    scale = inverse.repeat_interleave(u.shape[1] // call.groups, dim=1) * scale
    y = left.view(u.shape) * scale[:, :, None, None] + shift[:, :, None, None]
    if call.silu:
        y = y / (1 + torch.exp2(y * -math.log2(math.e)))
    results = (y, kept if call.keep else kept[:0])
    return tuple(t.to(x.dtype).contiguous(memory_format=torch.channels_last) for t in results)  # type: ignore[return-value]


_group_norm = op.define(
    "group_norm(Tensor x, Tensor weight, Tensor beta, int groups, float tiny, Tensor? skip, Tensor? residual, "
    "Tensor? bias, Tensor? time, bool scale_shift, bool silu, bool keep, str backend) -> (Tensor, Tensor)",
    _run,
    _empty,
)
