"""The fused operations as PyTorch custom operators, ``torch.ops.fastddpm.*``: opaque to torch.compile and torch.export.

Each body picks kernel or twin when it runs. A counter travels as three optional tensors and a stream; noise that a
caller brings, as a tensor. ``fastddpm.ops`` checks arguments before they get here.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fastddpm.noise.v1 import Counter
from fastddpm.ops import gradients
from fastddpm.ops.backend import use_triton
from fastddpm.ops.memory import empty_as
from fastddpm.ops.overlap import check_overlap
from fastddpm.ops.twins import Flags

_KEYS = "Tensor? seed, Tensor? sample_id, Tensor? step, int stream"
_FLAGS = "bool clip, bool learned, bool guided, bool use_m, bool use_prev"
_HOW = "str backend, bool compiled"


def _define(name: str, arguments: str, result: str, mutates: tuple[str, ...] = ()) -> Any:
    """``custom_op`` with one body for the CPU and for CUDA."""

    def register(body: Any) -> Any:
        op = torch.library.custom_op(
            f"fastddpm::{name}", body, mutates_args=mutates, device_types="cpu", schema=f"({arguments}) -> {result}"
        )
        op.register_kernel("cuda")(body)
        return op

    return register


def call(op: Any, *arguments: Any) -> Any:
    """Call an operator; or its body alone for plain CPU tensors that nobody differentiates, traces or watches.

    The bits are the same, but a process's first call of a custom operator imports Dynamo, which takes as long as
    importing torch did.
    """
    if torch.compiler.is_compiling():
        return op(*arguments)
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    plain = all(type(t) is Tensor and t.device.type == "cpu" for t in tensors)
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not plain or differentiated or _is_watched():
        return op(*arguments)
    return op._init_fn(*arguments)


def _is_watched() -> bool:
    """Whether a dispatch mode (fake tensors, a profiler of operations) or a functorch transform is active."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _implementation(backend: str, device: torch.device) -> Any:
    name = "triton_backend" if use_triton(backend, device) else "torch_backend"
    return importlib.import_module(f"fastddpm.ops.{name}")


def _noise(
    noise: Tensor | None, seed: Tensor | None, sample_id: Tensor | None, step: Tensor | None, stream: int
) -> Any:
    if seed is None or sample_id is None or step is None:
        return noise
    return Counter(seed, sample_id, step, stream)


@_define("randn_out", f"Tensor seed, Tensor sample_id, Tensor step, int stream, Tensor(a!) out, {_HOW}", "()", ("out",))
def randn_out(
    seed: Tensor, sample_id: Tensor, step: Tensor, stream: int, out: Tensor, backend: str, compiled: bool
) -> None:
    samples = out.view(out.shape[0], out.shape[1:].numel())
    _implementation(backend, out.device).randn(samples, Counter(seed, sample_id, step, stream), compiled)


@randn_out.register_fake
def _(*_: Any) -> None:
    return None


@_define(
    "randn",
    f"Tensor seed, Tensor sample_id, Tensor step, int stream, SymInt batch, SymInt n, ScalarType dtype, {_HOW}",
    "Tensor",
)
def randn(
    seed: Tensor,
    sample_id: Tensor,
    step: Tensor,
    stream: int,
    batch: int,
    n: int,
    dtype: torch.dtype,
    backend: str,
    compiled: bool,
) -> Tensor:
    out = seed.new_empty((batch, n), dtype=dtype)
    randn_out._init_fn(seed, sample_id, step, stream, out, backend, compiled)
    return out


@randn.register_fake
def _(seed: Tensor, sample_id: Tensor, step: Tensor, stream: int, batch: int, n: int, dtype: Any, *_: Any) -> Tensor:
    return seed.new_empty((batch, n), dtype=dtype)


@_define(
    "q_sample",
    f"Tensor x_0, Tensor rows, Tensor row, Tensor? noise, {_KEYS}, bool return_eps, {_HOW}",
    "(Tensor, Tensor)",
)
def q_sample(
    x_0: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_id: Tensor | None,
    step: Tensor | None,
    stream: int,
    return_eps: bool,
    backend: str,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    out, eps = x_0.new_empty(x_0.shape), x_0.new_empty(x_0.shape if return_eps else (0,))
    source = _noise(noise, seed, sample_id, step, stream)
    run = _implementation(backend, x_0.device).q_sample
    run(x_0, rows, row, source, out, eps if return_eps else None, compiled)
    return out, eps


@q_sample.register_fake
def _(x_0: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return_eps = rest[-3]
    return x_0.new_empty(x_0.shape), x_0.new_empty(x_0.shape if return_eps else (0,))


def _q_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, rows, row, noise = inputs[:4]
    ctx.save_for_backward(rows, row, noise)


def _q_backward(ctx: Any, grad: Tensor, grad_eps: Tensor | None) -> tuple[Tensor | None, ...]:
    rows, row, noise = ctx.saved_tensors
    grad_x, grad_noise = gradients.q_sample_backward(grad, grad_eps, rows, row, noise)
    return grad_x, None, None, grad_noise, *(None,) * 7


q_sample.register_autograd(_q_backward, setup_context=_q_setup)

_P_ARGUMENTS = f"Tensor x_t, Tensor m, Tensor rows, Tensor row, Tensor? noise, {_KEYS}, Tensor? x0_prev, {_FLAGS}"


@_define(
    "p_sample_out",
    f"{_P_ARGUMENTS}, Tensor(a!) out, Tensor(b!)? x0_out, Tensor(c!)? low_out, {_HOW}",
    "()",
    ("out", "x0_out", "low_out"),
)
def p_sample_out(
    x_t: Tensor,
    m: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_id: Tensor | None,
    step: Tensor | None,
    stream: int,
    x0_prev: Tensor | None,
    clip: bool,
    learned: bool,
    guided: bool,
    use_m: bool,
    use_prev: bool,
    out: Tensor,
    x0_out: Tensor | None,
    low_out: Tensor | None,
    backend: str,
    compiled: bool,
) -> None:
    check_overlap(
        {"x_t": x_t, "m": m, "noise": noise, "x0_prev": x0_prev}, {"out": out, "x0_out": x0_out, "low_out": low_out}
    )
    flags = Flags(clip, learned, guided, use_m, use_prev)
    source = _noise(noise, seed, sample_id, step, stream)
    run = _implementation(backend, x_t.device).p_sample
    run(x_t, m, rows, row, source, flags, x0_prev, out, x0_out, low_out, compiled)


@p_sample_out.register_fake
def _(*_: Any) -> None:
    return None


@_define("p_sample", f"{_P_ARGUMENTS}, {_HOW}", "Tensor")
def p_sample(x_t: Tensor, *rest: Any) -> Tensor:
    out = x_t.new_empty(x_t.shape)
    *arguments, backend, compiled = rest
    p_sample_out._init_fn(x_t, *arguments, out, None, None, backend, compiled)
    return out


@p_sample.register_fake
def _(x_t: Tensor, *_: Any) -> Tensor:
    return x_t.new_empty(x_t.shape)


def _p_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x_t, m, rows, row, noise, seed, sample_id, step, stream, x0_prev, *flags = inputs[:15]
    ctx.save_for_backward(x_t, m, rows, row, noise, seed, sample_id, step, x0_prev)
    ctx.stream, ctx.flags, ctx.how = stream, Flags(*flags), inputs[15:]


def _p_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_t, m, rows, row, z, seed, sample_id, step, x0_prev = ctx.saved_tensors
    given = z is not None
    if seed is not None:
        shape = x_t.shape
        z = torch.ops.fastddpm.randn(
            seed, sample_id, step, ctx.stream, shape[0], shape[1:].numel(), torch.float32, *ctx.how
        ).view(shape)
    grad_x, grad_m, grad_z, grad_prev = gradients.p_sample_backward(grad, x_t, m, rows, row, z, ctx.flags)
    return (
        grad_x.to(x_t.dtype),
        grad_m.to(m.dtype),
        None,
        None,
        grad_z.to(z.dtype) if given else None,
        *(None,) * 4,
        grad_prev.to(x0_prev.dtype) if x0_prev is not None and ctx.flags.use_prev else None,
        *(None,) * 7,
    )


p_sample.register_autograd(_p_backward, setup_context=_p_setup)

_LOSS_ARGUMENTS = f"Tensor m, Tensor? x_0, Tensor rows, Tensor row, {_KEYS}, bool learned"


@_define("ddpm_loss", f"{_LOSS_ARGUMENTS}, {_HOW}", "Tensor")
def ddpm_loss(
    m: Tensor,
    x_0: Tensor | None,
    rows: Tensor,
    row: Tensor,
    seed: Tensor | None,
    sample_id: Tensor | None,
    step: Tensor | None,
    stream: int,
    learned: bool,
    backend: str,
    compiled: bool,
) -> Tensor:
    noise = _noise(None, seed, sample_id, step, stream)
    sums = _implementation(backend, m.device).ddpm_loss(m, x_0, rows, row, noise, learned, compiled)
    return (sums * _loss_weights(m, rows, row, learned)).to(torch.promote_types(m.dtype, torch.float32))


@ddpm_loss.register_fake
def _(m: Tensor, *_: Any) -> Tensor:
    return m.new_empty(m.shape[0], dtype=torch.promote_types(m.dtype, torch.float32))


def _loss_weights(m: Tensor, rows: Tensor, row: Tensor, learned: bool) -> Tensor:
    """What a sample's sum of squares is multiplied by: the weight of its row over its number of elements."""
    n = m.shape[1:].numel() // (2 if learned else 1)
    return rows[:, 2].index_select(0, row) / max(n, 1)


@_define("ddpm_loss_gradient", f"{_LOSS_ARGUMENTS}, Tensor scale, {_HOW}", "Tensor")
def ddpm_loss_gradient(
    m: Tensor,
    x_0: Tensor | None,
    rows: Tensor,
    row: Tensor,
    seed: Tensor | None,
    sample_id: Tensor | None,
    step: Tensor | None,
    stream: int,
    learned: bool,
    scale: Tensor,
    backend: str,
    compiled: bool,
) -> Tensor:
    out = empty_as(m)
    if learned:
        out.chunk(2, dim=1)[1].zero_()
    noise = _noise(None, seed, sample_id, step, stream)
    run = _implementation(backend, m.device).ddpm_loss_gradient
    run(m, x_0, rows, row, noise, learned, scale, out, compiled)
    return out


@ddpm_loss_gradient.register_fake
def _(m: Tensor, *_: Any) -> Tensor:
    return empty_as(m)


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.stream, ctx.learned, backend, compiled = inputs
    ctx.save_for_backward(*tensors)
    ctx.how = backend, compiled


def _loss_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    m, x_0, rows, row, *keys = ctx.saved_tensors
    scale = (-2.0 * grad * _loss_weights(m, rows, row, ctx.learned)).to(grad.dtype)
    grad_m = torch.ops.fastddpm.ddpm_loss_gradient(m, x_0, rows, row, *keys, ctx.stream, ctx.learned, scale, *ctx.how)
    grad_x = gradients.x_0_backward(grad_m, x_0, rows, row) if ctx.needs_input_grad[1] else None
    return grad_m, grad_x, *(None,) * 9


ddpm_loss.register_autograd(_loss_backward, setup_context=_loss_setup)
