"""The fused training loss: each sample's weighted mean of squares, against noise that is drawn again, not read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm.noise.v1 import Counter
from fastddpm.ops import operators as op
from fastddpm.ops import twins
from fastddpm.ops.twins import columns


def ddpm_loss(
    m: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Counter | None,
    x_0: Tensor | None,
    *,
    learned: bool = False,
    backend: str = "auto",
    compiled: bool = False,
) -> Tensor:
    """Return each sample's weighted mean of ||target - m||^2, target = c_eps * eps + c_x0 * x_0   (eq. 14).

    Args:
        m: the network's output [B, ...], contiguous or channels-last (else it is copied).
        rows: float32 [R, 3], columns (c_eps, c_x0, weight): ``table.loss_rows``.
        row: int64 [B] or [1].
        noise: a Counter that names eps; None where the target has no such term.
        x_0: [B, ...]; None where the target has no such term.
        learned: m has twice the channels, and its second half has no part in the loss.

    Returns:
        float32 [B]. Differentiable once, in m and x_0.

    Raises:
        ValueError: for shapes or devices that do not fit together, or a target without any term.
        TypeError: for a dtype that is not float32, float16 or bfloat16.
        BackendUnavailable: "triton" was asked for and cannot run.
    """
    op.check_dtype("m, the network's output,", m.dtype)
    op.check_rows(rows, row, m, 3)
    if learned and (m.dim() < 2 or m.shape[1] % 2):
        raise ValueError(f"a learned variance needs m [B, 2C, ...], got {tuple(m.shape)}")
    if noise is None and x_0 is None:
        raise ValueError("give noise, x_0 or both: the target has no term")
    if x_0 is not None:
        op.check_dtype("x_0", x_0.dtype)
        op.check_output(m, x_0, learned)
    if noise is not None:
        op.check_counter(noise, m.shape[0], m.device)
    return _ddpm_loss(m, x_0, rows, row, noise, learned, backend, compiled)


def _losses(
    m: Tensor, x_0: Tensor | None, rows: Tensor, row: Tensor, noise: op.Noise, learned: bool, *how: Any
) -> Tensor:
    sums = m.new_empty(len(m), dtype=torch.float64)
    op.execute(squares_kernel, twins.squares, (sums,), (m, x_0, rows, row, noise, learned), *how)
    return (sums * _weights(m, rows, row, learned)).to(torch.promote_types(m.dtype, torch.float32))


def _weights(m: Tensor, rows: Tensor, row: Tensor, learned: bool) -> Tensor:
    """What a sample's sum of squares is multiplied by: the weight of its row over its number of elements."""
    n = m.shape[1:].numel() // (2 if learned else 1)
    return rows[:, 2].index_select(0, row) / max(n, 1)


def _gradient(m: Tensor, *arguments: Any) -> Tensor:
    *_, learned, _, backend, compiled = arguments
    out = target = op.empty_as(m)
    if learned:
        target, unread = out.chunk(2, dim=1)
        unread.zero_()
    op.execute(scaled_residual_kernel, twins.scaled_residual, (target,), (m, *arguments[:-2]), backend, compiled)
    return out


def squares_kernel(targets: tuple[Tensor], m: Tensor, *arguments: Any) -> None:
    """Fill float64 [B] with each sample's sum of squared residuals."""
    if m.numel() == 0:
        targets[0].zero_()
        return
    from fastddpm.kernels.ddpm_loss import ddpm_loss_launch

    launch, sums = ddpm_loss_launch(op.dense_or_nhwc(m), *map(op.dense, arguments))
    launch.run()
    torch.sum(sums, dim=1, dtype=torch.float64, out=targets[0])


def scaled_residual_kernel(targets: tuple[Tensor], m: Tensor, *arguments: Any) -> None:
    """Fill what the loss reads of a tensor like ``operators.empty_as(m)`` with scale [B] times the residuals."""
    if m.numel():
        from fastddpm.kernels.ddpm_loss import ddpm_loss_launch

        ddpm_loss_launch(op.dense_or_nhwc(m), *map(op.dense, arguments), targets[0])[0].run()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    m, x_0, rows, row, noise, ctx.stream, ctx.learned, *ctx.how = inputs
    ctx.save_for_backward(m, x_0, rows, row, *noise)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    m, x_0, rows, row, *noise = ctx.saved_tensors
    scale = (-2.0 * grad * _weights(m, rows, row, ctx.learned)).to(grad.dtype)
    grad_m = _ddpm_loss_gradient(m, x_0, rows, row, op.unpack(noise, ctx.stream), ctx.learned, scale, *ctx.how)
    grad_x = _x_0_backward(grad_m, x_0, rows, row) if ctx.needs_input_grad[1] else None
    return grad_m, grad_x, None, None, [None] * len(noise), *(None,) * 4


def _x_0_backward(grad_m: Tensor, x_0: Tensor, rows: Tensor, row: Tensor) -> Tensor:
    """The gradient for x_0 from that for m: both enter c_x0 * x_0 - m."""
    _, c_x0, _ = columns(rows, row, x_0)
    half = grad_m if grad_m.shape == x_0.shape else grad_m.chunk(2, dim=1)[0]
    return (-c_x0 * half.to(torch.promote_types(half.dtype, torch.float32))).to(x_0.dtype)


_ARGUMENTS = f"Tensor m, Tensor? x_0, Tensor rows, Tensor row, {op.NOISE}, bool learned"
_ddpm_loss = op.define(
    f"ddpm_loss({_ARGUMENTS}, {op.HOW}) -> Tensor",
    _losses,
    lambda m, *_: m.new_empty(m.shape[0], dtype=torch.promote_types(m.dtype, torch.float32)),
    _setup,
    _backward,
)
_ddpm_loss_gradient = op.define(
    f"ddpm_loss_gradient({_ARGUMENTS}, Tensor scale, {op.HOW}) -> Tensor", _gradient, lambda m, *_: op.empty_as(m)
)
