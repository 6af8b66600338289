"""Backward formulas of the fused operations, in PyTorch operations that autograd can differentiate again."""

from __future__ import annotations

import torch
from torch import Tensor

from fastddpm.ops.twins import Flags, columns, network_output


def q_sample_backward(
    grad: Tensor, grad_eps: Tensor | None, rows: Tensor, row: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of (x_t, eps) = (c_x * x_0 + sigma * eps, eps) for x_0 and, where the caller brought it, eps."""
    c_x, sigma = columns(rows, row, grad)
    grad_x = (c_x * grad.float()).to(grad.dtype)
    if noise is None:
        return grad_x, None
    grad_noise = sigma * grad.float()
    if grad_eps is not None and grad_eps.shape == grad.shape:
        grad_noise = grad_noise + grad_eps.float()
    return grad_x, grad_noise.to(noise.dtype)


def x_0_backward(grad_m: Tensor, x_0: Tensor, rows: Tensor, row: Tensor) -> Tensor:
    """Gradient of a training loss for x_0, from that for the network's output m: both enter c_x0 * x_0 - m."""
    _, c_x0, _ = columns(rows, row, x_0)
    half = grad_m if grad_m.shape == x_0.shape else grad_m.chunk(2, dim=1)[0]
    return (-c_x0 * half.to(torch.promote_types(half.dtype, torch.float32))).to(x_0.dtype)


def p_sample_backward(
    grad: Tensor,
    x_t: Tensor,
    m: Tensor,
    rows: Tensor,
    row: Tensor,
    z: Tensor | None,
    flags: Flags,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x_prev for x_t, m, z and x0_prev, float32.

    Args:
        grad: gradient for x_prev, [B, ...].
        x_t, m, rows, row, flags: as in ``twins.p_sample``.
        z: the noise that the step used, or None if it added none.
    """
    a, b, lo, hi, c_x0, c_xt, c_m, c_1, sigma, h0, h1, w, _, _ = columns(rows, row, x_t)
    prediction, v = network_output(m, w, flags)
    g = grad.float()
    grad_x0 = c_x0 * g
    if flags.clip:
        raw = a * x_t.float() + b * prediction
        grad_x0 = torch.where((raw >= lo) & (raw <= hi), grad_x0, 0.0)
    grad_m = b * grad_x0
    if flags.use_m:
        grad_m = grad_m + c_m * g
    grad_z = grad_v = torch.zeros_like(g)
    if z is not None:
        std = sigma if v is None else sigma * torch.exp(h0 + h1 * v)
        grad_z = torch.where(sigma == 0, 0.0, std * g)
        grad_v = torch.where(sigma == 0, 0.0, std * g * z.float() * h1)
    return a * grad_x0 + c_xt * g, _join(grad_m, grad_v, w, flags), grad_z, c_1 * g


def _join(grad_m: Tensor, grad_v: Tensor, w: Tensor, flags: Flags) -> Tensor:
    """Undo ``step.network_output``."""
    if not flags.guided:
        return torch.cat((grad_m, grad_v), dim=1) if flags.learned else grad_m
    conditional, unconditional = w * grad_m, grad_m - w * grad_m
    if flags.learned:
        conditional = torch.cat((conditional, grad_v), dim=1)
        unconditional = torch.cat((unconditional, torch.zeros_like(grad_v)), dim=1)
    return torch.cat((conditional, unconditional))
