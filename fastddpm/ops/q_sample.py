"""The fused forward process: x_t from x_0, or from x_{t-1}."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm.noise.v1 import Counter
from fastddpm.ops import operators as op
from fastddpm.ops import twins
from fastddpm.ops.twins import columns


def q_sample(
    x_0: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Counter | Tensor,
    *,
    return_eps: bool = False,
    out: Tensor | None = None,
    keep: Tensor | None = None,
    backend: str = "auto",
    compiled: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw x_t = c_x * x_0 + sigma * eps   (Ho et al. 2020, eq. 4; with the rows of q_step, eq. 2).

    Args:
        x_0: [B, ...] in any layout.
        rows: float32 [R, 2], columns (c_x, sigma): ``table.q_rows`` or ``table.q_step_rows``.
        row: int64 [B] or [1], 0-based.
        noise: a Counter, or eps with x_0's shape and dtype.
        return_eps: also return the noise.
        out, keep: a contiguous tensor of x_0's shape and dtype that x_t is written into, and bool of that shape: where
            it is true, `out` stays as it is (Lugmayr et al. 2022, eq. 8). They go together, without return_eps.

    Returns:
        x_t, contiguous, x_0's shape and dtype; or (x_t, eps). Differentiable in x_0 and eps. With `out`, that itself.

    Raises:
        ValueError: for shapes, devices or dtypes that do not fit together.
        RuntimeError: `out` is given, and a gradient would be lost.
        TypeError: for a dtype that is not float32, float16 or bfloat16.
        BackendUnavailable: "triton" was asked for and cannot run.
    """
    op.check_dtype("x_0", x_0.dtype)
    op.check_rows(rows, row, x_0, 2)
    op.check_noise(noise, x_0)
    if isinstance(noise, Tensor) and noise.dtype != x_0.dtype:
        raise ValueError(f"noise is {noise.dtype}, but x_0 is {x_0.dtype}; convert one of them")
    if out is None and keep is None:
        x_t, eps = _q_sample(x_0, rows, row, noise, return_eps, backend, compiled)
        return (x_t, eps) if return_eps else x_t
    if out is None or keep is None or return_eps:
        raise ValueError("out= and keep= go together, and without return_eps; give both")
    for name, tensor, dtype in (("out", out, x_0.dtype), ("keep", keep, torch.bool)):
        if (tensor.dtype, tensor.shape, tensor.device) != (dtype, x_0.shape, x_0.device):
            raise ValueError(
                f"{name} must be {dtype} {list(x_0.shape)} on {x_0.device} like x_0, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    op.refuse_gradients({"x_0": x_0, "noise": noise, "out": out})
    op.check_overlap({"x_0": x_0, "noise": noise, "keep": keep}, {"out": out})
    _q_sample_out(x_0, rows, row, noise, keep, out, backend, compiled)
    return out


def _draw_into(x_0: Tensor, rows: Tensor, row: Tensor, noise: op.Noise, keep: Tensor, out: Tensor, *how: Any) -> None:
    op.execute(q_sample_kernel, twins.q_sample, (out, None), (x_0, rows, row, noise, keep, out), *how)


def _draw(
    x_0: Tensor, rows: Tensor, row: Tensor, noise: op.Noise, return_eps: bool, *how: Any
) -> tuple[Tensor, Tensor]:
    out, eps = _empty(x_0, rows, row, noise, return_eps)
    op.execute(q_sample_kernel, twins.q_sample, (out, eps if return_eps else None), (x_0, rows, row, noise), *how)
    return out, eps


def q_sample_kernel(targets: op.Targets, x_0: Tensor, *arguments: Any) -> None:
    """Fill contiguous (x_t, eps); x_t only where keep is False. Arguments as in ``twins.q_sample``."""
    if x_0.numel():
        from fastddpm.kernels.q_sample import q_sample_launch

        rows, row, noise, keep = map(op.dense, (*arguments[:3], arguments[3] if arguments[3:] else None))
        q_sample_launch(op.dense(x_0), rows, row, noise, *targets, keep).run()


def _empty(x_0: Tensor, rows: Tensor, row: Tensor, noise: op.Noise, return_eps: bool, *_: Any) -> tuple[Tensor, Tensor]:
    return x_0.new_empty(x_0.shape), x_0.new_empty(x_0.shape if return_eps else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, rows, row, noise, *_ = inputs
    ctx.save_for_backward(rows, row)
    ctx.given = len(noise) == 1


def _backward(ctx: Any, grad: Tensor, grad_eps: Tensor | None) -> tuple[Any, ...]:
    """x_t = c_x * x_0 + sigma * eps; a caller's eps is returned as well."""
    rows, row = ctx.saved_tensors
    c_x, sigma = columns(rows, row, grad)
    grad_z = sigma * grad.float()
    if grad_eps is not None and grad_eps.shape == grad.shape:
        grad_z = grad_z + grad_eps.float()
    grad_noise = [grad_z.to(grad.dtype)] if ctx.given else [None] * 3
    return (c_x * grad.float()).to(grad.dtype), None, None, grad_noise, *(None,) * 4


_q_sample_out = op.define(
    f"q_sample_out(Tensor x_0, Tensor rows, Tensor row, {op.NOISE}, Tensor keep, Tensor(a!) out, {op.HOW}) -> ()",
    _draw_into,
    lambda *_: None,
)
_q_sample = op.define(
    f"q_sample(Tensor x_0, Tensor rows, Tensor row, {op.NOISE}, bool return_eps, {op.HOW}) -> (Tensor, Tensor)",
    _draw,
    _empty,
    _setup,
    _backward,
)
