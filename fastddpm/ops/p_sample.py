"""The fused reverse step: one table row per sample, of any sampler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm.noise.v1 import Counter
from fastddpm.ops import operators as op
from fastddpm.ops import twins
from fastddpm.ops.randn import randn
from fastddpm.ops.twins import Flags, columns, network_output, slot


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
    history: Tensor | None = None,
    out: Tensor | None = None,
    x0_out: Tensor | None = None,
    low_out: Tensor | None = None,
    backend: str = "auto",
    compiled: bool = False,
) -> Tensor:
    """Execute one row of a table for each sample: x_{t-1} from x_t and m   (Ho et al. 2020, eqs. 11, 15).

    Args:
        x_t: [B, C, ...] in any layout.
        m: the network's output on the same device, contiguous or channels-last (else it is copied): x_t's shape;
            [B, 2C, ...] if ``learned``; [2B, ...], conditional half first, if ``guided``.
        rows: float32 [R, 14], see ``table.COLUMNS``.
        row: int64 [B] or [1].
        noise: a Counter; or z of x_t's shape; or None for no noise term.
        clip, learned, guided, use_m: what the rows need, see ``fastddpm.ops.twins``.
        history: the older x0 that the rows need, [H, B, C, ...] with H = 1, 2 or 3, zeros before the first row. A
            ring: the x0 of k rows before lies in slot (row - k) mod H. If an output is given, this step's x0 takes the
            place of the oldest; else the history stays as it is.
        out: where x_prev goes, x_t's shape and dtype; may be x_t itself.
        x0_out: filled with the estimate of x_0, of x_t's shape.
        low_out: filled with x_prev in its own dtype and layout, of x_t's shape.

    Returns:
        x_prev: ``out``, or a new contiguous tensor, which is differentiable in x_t, m, z and history.

    Raises:
        ValueError: for shapes or devices that do not fit together, or memory that overlaps.
        TypeError: for a dtype that is not float32, float16 or bfloat16.
        RuntimeError: if an output tensor is given while an input requires a gradient.
        BackendUnavailable: "triton" was asked for and cannot run.
    """
    op.check_dtype("x_t", x_t.dtype)
    op.check_rows(rows, row, x_t, 14)
    op.check_output(m, x_t, learned, guided)
    if history is not None:
        if history.dim() == 0 or len(history) not in (1, 2, 3):
            raise ValueError(f"history must be [H, *x_t.shape] with H = 1, 2 or 3, got {tuple(history.shape)}")
        op.check_like("history, without its first dimension,", history[0], x_t)
    op.check_noise(noise, x_t)
    outputs = {"out": out, "x0_out": x0_out, "low_out": low_out}
    for name, tensor in outputs.items():
        if tensor is not None:
            op.check_like(name, tensor, x_t)
    if out is not None and out.dtype != x_t.dtype:
        raise ValueError(f"out is {out.dtype}, but x_t is {x_t.dtype}; use low_out for a copy in another dtype")
    flags = Flags(clip, learned, guided, use_m, 0 if history is None else len(history))
    arguments = (x_t, m, rows, row, noise, history, flags.to_int())
    if all(tensor is None for tensor in outputs.values()):
        return _p_sample(*arguments, backend, compiled)
    op.refuse_gradients({"x_t": x_t, "m": m, "noise": noise, "history": history, **outputs})
    out = torch.empty_like(x_t, memory_format=torch.contiguous_format) if out is None else out
    _p_sample_out(*arguments, out, x0_out, low_out, backend, compiled)
    return out


def _step_into(*given: Any) -> None:
    x_t, m, rows, row, noise, history, flags, *targets, backend, compiled = given
    outputs = dict(zip(("out", "x0_out", "low_out", "history"), (*targets, history), strict=True))
    op.check_overlap({"x_t": x_t, "m": m, "noise": noise}, outputs)
    arguments = (x_t, m, rows, row, noise, Flags.from_int(flags), history)
    op.execute(p_sample_kernel, twins.p_sample, tuple(targets), arguments, backend, compiled)
    if history is not None:
        torch.autograd.graph.increment_version(history)


def p_sample_kernel(targets: op.Targets, *arguments: Any) -> None:
    """Fill (x_prev, x0, a copy of x_prev), and the oldest slot of the history; arguments as in ``twins.p_sample``."""
    x_t, m, rows, row, noise, flags, history = arguments
    if x_t.numel() == 0:
        return
    from fastddpm.kernels.p_sample import p_sample_launch

    ring = op.dense(history)
    x_prev, x0, low = _scratch(targets[0]), _scratch(targets[1]), _scratch(targets[2], nhwc=True)
    inputs = (op.dense(x_t), op.dense_or_nhwc(m), *map(op.dense, (rows, row, noise)))
    p_sample_launch(*inputs, x_prev, ring=ring, x0_out=x0, low_out=low, **flags._asdict()).run()
    for target, written in zip((*targets, history), (x_prev, x0, low, ring), strict=True):
        if target is not None and written is not target:
            target.copy_(written)


def _scratch(target: Tensor | None, nhwc: bool = False) -> Any:
    """Where the kernel writes: the target itself, or contiguous memory to be copied from."""
    if target is None or target.is_contiguous() or (nhwc and op.is_channels_last(target)):
        return target
    return torch.empty_like(target, memory_format=torch.contiguous_format)


def _step(x_t: Tensor, *rest: Any) -> Tensor:
    *arguments, history, flags, backend, compiled = rest
    out, ring = _empty(x_t), None if history is None else history.clone()
    _step_into(*(x_t, *arguments, ring, flags, out, None, None, backend, compiled))
    return out


def _empty(x_t: Tensor, *_: Any) -> Tensor:
    return x_t.new_empty(x_t.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x_t, m, rows, row, noise, ctx.stream, history, flags, *ctx.how = inputs
    ctx.save_for_backward(x_t, m, rows, row, history, *noise)
    ctx.flags = Flags.from_int(flags)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """In PyTorch operations that autograd can differentiate again."""
    x_t, m, rows, row, history, *noise = ctx.saved_tensors
    flags, source = ctx.flags, op.unpack(noise, ctx.stream)
    a, b, lo, hi, c_x0, c_xt, c_m, c_1, sigma, h0, h1, w, c_2, c_3 = columns(rows, row, x_t)
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
    if source is not None:
        std = sigma if v is None else sigma * torch.exp(h0 + h1 * v)
        grad_z = torch.where(sigma == 0, 0.0, std * g)
        if v is not None:
            z = source if isinstance(source, Tensor) else randn(source, x_t.shape[1:], torch.float32, None, *ctx.how)
            grad_v = torch.where(sigma == 0, 0.0, std * g * z.float() * h1)
    grad_history = None if history is None else torch.zeros_like(history)
    if history is not None and grad_history is not None:
        for age, c in enumerate((c_1, c_2, c_3)[: flags.history], start=1):
            where = slot(row, age, flags.history, len(x_t))
            grad_history = grad_history.index_put(where, (c * g).to(history.dtype))
    return (
        (a * grad_x0 + c_xt * g).to(x_t.dtype),
        _join(grad_m, grad_v, w, flags).to(m.dtype),
        None,
        None,
        [grad_z.to(source.dtype)] if isinstance(source, Tensor) else [None] * len(noise),
        None,
        grad_history,
        *(None,) * 3,
    )


def _join(grad_m: Tensor, grad_v: Tensor, w: Tensor, flags: Flags) -> Tensor:
    """Undo ``twins.network_output``."""
    if not flags.guided:
        return torch.cat((grad_m, grad_v), dim=1) if flags.learned else grad_m
    conditional, unconditional = w * grad_m, grad_m - w * grad_m
    if flags.learned:
        conditional = torch.cat((conditional, grad_v), dim=1)
        unconditional = torch.cat((unconditional, torch.zeros_like(grad_v)), dim=1)
    return torch.cat((conditional, unconditional))


_INPUTS = f"Tensor x_t, Tensor m, Tensor rows, Tensor row, {op.NOISE}"
_p_sample_out = op.define(
    f"p_sample_out({_INPUTS}, Tensor(a!)? history, int flags, Tensor(b!) out, Tensor(c!)? x0_out, Tensor(d!)? low_out, "
    f"{op.HOW}) -> ()",
    _step_into,
    lambda *_: None,
)
_p_sample = op.define(
    f"p_sample({_INPUTS}, Tensor? history, int flags, {op.HOW}) -> Tensor", _step, _empty, _setup, _backward
)
