"""The one door to the fused operations: checks arguments, and leaves the choice of kernel or twin to the operators.

``backend`` is "auto" (the Triton kernel for GPU tensors where it can run, its twin elsewhere), "triton" (the kernel, or
BackendUnavailable) or "torch" (the twin). With ``compiled=True`` a twin on the CPU runs through Inductor where a C++
compiler exists. The bits are the same in every case.

State, network output and copies are float32, float16 or bfloat16, each of its own; the arithmetic is float32, and each
stored value is rounded once. For float64 there is ``fastddpm.reference``. No operation reads a tensor's value on the
host: a row index out of range is an error on the CPU and undefined on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastddpm.noise.v1 import Counter
from fastddpm.ops import operators as custom_ops
from fastddpm.ops.backend import check_backend

__all__ = ["Counter", "ddpm_loss", "p_sample", "q_sample", "randn"]

_STORAGE = (torch.float32, torch.float16, torch.bfloat16)
_P_COLUMNS, _Q_COLUMNS, _LOSS_COLUMNS = 14, 2, 3


def randn(
    counter: Counter,
    shape_per_sample: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str = "auto",
    compiled: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Draw noise-v1 of a counter.

    Args:
        counter: seed, sample_id and step int64 [B] or [1], on one device.
        shape_per_sample: shape without the batch.
        dtype: float32, float16 or bfloat16.
        device: must be the counter's device, if given.
        out: where to write, contiguous [B, *shape_per_sample] of that dtype.

    Returns:
        ``out``, or a new contiguous [B, *shape_per_sample]; B is the length of the counter's tensors.

    Raises:
        ValueError, TypeError: for arguments that do not fit.
        BackendUnavailable: "triton" was asked for and cannot run.
    """
    check_backend(backend)
    _check_dtype("dtype", dtype)
    batch = max(counter.seed.numel(), counter.sample_id.numel(), counter.step.numel())
    if 0 in (counter.seed.numel(), counter.sample_id.numel()):
        batch = 0
    _check_counter(counter, batch, counter.seed.device)
    if device is not None and torch.empty(0, device=device).device != counter.seed.device:
        raise ValueError(f"device is {device}, but the counter is on {counter.seed.device}; move the counter")
    shape = torch.Size((batch, *shape_per_sample))
    keys = counter.seed, counter.sample_id, counter.step, counter.stream
    if out is None:
        z = custom_ops.call(custom_ops.randn, *keys, batch, shape[1:].numel(), dtype, backend, compiled)
        return z.view(shape)
    _check_device("out", out, counter.seed.device)
    if (out.shape, out.dtype) != (shape, dtype) or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {dtype} {list(shape)}, got {out.dtype} {list(out.shape)} "
            f"with strides {list(out.stride())}"
        )
    custom_ops.call(custom_ops.randn_out, *keys, out, backend, compiled)
    return out


def q_sample(
    x_0: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Counter | Tensor,
    *,
    return_eps: bool = False,
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

    Returns:
        x_t, contiguous, x_0's shape and dtype; or (x_t, eps). Differentiable in x_0 and eps.

    Raises:
        ValueError: for shapes, devices or dtypes that do not fit together.
        TypeError: for a dtype that is not float32, float16 or bfloat16.
        BackendUnavailable: "triton" was asked for and cannot run.
    """
    check_backend(backend)
    _check_dtype("x_0", x_0.dtype)
    _check_rows(rows, row, x_0, _Q_COLUMNS)
    if isinstance(noise, Tensor):
        _check_like("noise", noise, x_0)
        if noise.dtype != x_0.dtype:
            raise ValueError(f"noise is {noise.dtype}, but x_0 is {x_0.dtype}; convert one of them")
    else:
        _check_counter(noise, x_0.shape[0], x_0.device)
    x_t, eps = custom_ops.call(custom_ops.q_sample, x_0, rows, row, *_unpack(noise), return_eps, backend, compiled)
    return (x_t, eps) if return_eps else x_t


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
    use_prev: bool = False,
    x0_prev: Tensor | None = None,
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
        clip, learned, guided, use_m, use_prev: what the rows need, see ``twins.p_sample``.
        x0_prev: the previous x0, x_t's shape; needed if ``use_prev``.
        out: where x_prev goes, x_t's shape and dtype; may be x_t itself.
        x0_out: filled with the estimate of x_0, of x_t's shape; may be x0_prev itself.
        low_out: filled with x_prev in its own dtype and layout, of x_t's shape.

    Returns:
        x_prev: ``out``, or a new contiguous tensor, which is differentiable in x_t, m, z and x0_prev.

    Raises:
        ValueError: for shapes or devices that do not fit together, or memory that overlaps.
        TypeError: for a dtype that is not float32, float16 or bfloat16.
        RuntimeError: if an output tensor is given while an input requires a gradient.
        BackendUnavailable: "triton" was asked for and cannot run.
    """
    check_backend(backend)
    _check_dtype("x_t", x_t.dtype)
    _check_rows(rows, row, x_t, _P_COLUMNS)
    _check_output(m, x_t, learned, guided)
    if use_prev:
        if x0_prev is None:
            raise ValueError("use_prev needs x0_prev, the x0 of the step before")
        _check_like("x0_prev", x0_prev, x_t)
    if isinstance(noise, Tensor):
        _check_like("noise", noise, x_t)
    elif noise is not None:
        _check_counter(noise, x_t.shape[0], x_t.device)
    outputs = {"out": out, "x0_out": x0_out, "low_out": low_out}
    for name, tensor in outputs.items():
        if tensor is not None:
            _check_like(name, tensor, x_t)
    if out is not None and out.dtype != x_t.dtype:
        raise ValueError(f"out is {out.dtype}, but x_t is {x_t.dtype}; use low_out for a copy in another dtype")
    arguments = (x_t, m, rows, row, *_unpack(noise), x0_prev if use_prev else None)
    flags = (clip, learned, guided, use_m, use_prev)
    if all(tensor is None for tensor in outputs.values()):
        return custom_ops.call(custom_ops.p_sample, *arguments, *flags, backend, compiled)
    _refuse_gradients({"x_t": x_t, "m": m, "noise": noise, "x0_prev": x0_prev, **outputs})
    out = torch.empty_like(x_t, memory_format=torch.contiguous_format) if out is None else out
    custom_ops.call(custom_ops.p_sample_out, *arguments, *flags, out, x0_out, low_out, backend, compiled)
    return out


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
    check_backend(backend)
    _check_dtype("m, the network's output,", m.dtype)
    _check_rows(rows, row, m, _LOSS_COLUMNS)
    if learned and (m.dim() < 2 or m.shape[1] % 2):
        raise ValueError(f"a learned variance needs m [B, 2C, ...], got {tuple(m.shape)}")
    if noise is None and x_0 is None:
        raise ValueError("give noise, x_0 or both: the target has no term")
    if x_0 is not None:
        _check_dtype("x_0", x_0.dtype)
        _check_output(m, x_0, learned, False)
    if noise is not None:
        _check_counter(noise, m.shape[0], m.device)
    _, *keys = _unpack(noise)
    return custom_ops.call(custom_ops.ddpm_loss, m, x_0, rows, row, *keys, learned, backend, compiled)


def _unpack(noise: Counter | Tensor | None) -> tuple[Any, ...]:
    if isinstance(noise, Counter):
        return None, noise.seed, noise.sample_id, noise.step, noise.stream
    return noise, None, None, None, 0


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in _STORAGE:
        hint = "; for float64 use fastddpm.reference" if dtype == torch.float64 else ""
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {dtype}{hint}")


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    _check_dtype(name, tensor.dtype)
    _check_device(name, tensor, x.device)
    if tensor.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, x has {tuple(x.shape)}; nothing is broadcast")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but x is on {device}; move one of them")


def _check_indices(name: str, index: Tensor, batch: int, device: torch.device) -> None:
    _check_device(name, index, device)
    if index.dtype != torch.int64 or index.dim() != 1 or index.shape[0] not in (1, batch):
        raise ValueError(f"{name} must be int64 [1] or [{batch}], got {index.dtype} {list(index.shape)}")


def _check_counter(counter: Counter, batch: int, device: torch.device) -> None:
    for name, tensor in (("seed", counter.seed), ("sample_id", counter.sample_id), ("step", counter.step)):
        _check_indices(name, tensor, batch, device)


def _check_rows(rows: Tensor, row: Tensor, x: Tensor, columns: int) -> None:
    if x.dim() == 0:
        raise ValueError("x must be [B, ...], samples first, got a scalar")
    _check_device("rows", rows, x.device)
    if rows.dtype != torch.float32 or rows.dim() != 2 or rows.shape[1] != columns or rows.shape[0] == 0:
        raise ValueError(f"rows must be float32 [R, {columns}] with R >= 1, got {rows.dtype} {list(rows.shape)}")
    _check_indices("row", row, x.shape[0], x.device)


def _check_output(m: Tensor, x_t: Tensor, learned: bool, guided: bool) -> None:
    _check_dtype("m, the network's output,", m.dtype)
    _check_device("m, the network's output,", m, x_t.device)
    expected = list(x_t.shape)
    if learned:
        if x_t.dim() < 2:
            raise ValueError(f"a learned variance needs x_t [B, C, ...], got {tuple(x_t.shape)}")
        expected[1] *= 2
    if guided:
        expected[0] *= 2
    if list(m.shape) == expected:
        return
    message = f"m, the network's output, has shape {tuple(m.shape)}; expected {tuple(expected)}, nothing is broadcast"
    if not learned and x_t.dim() > 1 and list(m.shape[1:]) == [2 * x_t.shape[1], *x_t.shape[2:]]:
        message += "; twice the channels need a table with variance_type 'learned' or 'learned_range' (learned=True)"
    raise ValueError(message)


def _refuse_gradients(tensors: dict[str, Any]) -> None:
    if not torch.is_grad_enabled():
        return
    names = [name for name, t in tensors.items() if isinstance(t, Tensor) and t.requires_grad]
    if names:
        raise RuntimeError(
            f"{', '.join(names)} requires a gradient, but a step that writes into given tensors has none; call it "
            "under torch.no_grad(), or without out, x0_out and low_out"
        )
