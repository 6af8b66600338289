"""Noise-v1 of a counter, drawn by the kernel or its twin."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from fastddpm.noise.v1 import MAX_ELEMENTS, Counter
from fastddpm.ops import operators as op
from fastddpm.ops import twins


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
    op.check_dtype("dtype", dtype)
    batch = max(counter.seed.numel(), counter.sample_id.numel(), counter.step.numel())
    if 0 in (counter.seed.numel(), counter.sample_id.numel()):
        batch = 0
    op.check_counter(counter, batch, counter.seed.device)
    if device is not None and torch.empty(0, device=device).device != counter.seed.device:
        raise ValueError(f"device is {device}, but the counter is on {counter.seed.device}; move the counter")
    shape = torch.Size((batch, *shape_per_sample))
    if out is None:
        return _randn(counter, batch, shape[1:].numel(), dtype, backend, compiled).view(shape)
    op.check_device("out", out, counter.seed.device)
    if (out.shape, out.dtype) != (shape, dtype) or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {dtype} {list(shape)}, got {out.dtype} {list(out.shape)} "
            f"with strides {list(out.stride())}"
        )
    _randn_out(counter, out, backend, compiled)
    return out


def _fill(counter: Counter, out: Tensor, backend: str, compiled: bool) -> None:
    n = out.shape[1:].numel()
    z = out.view(len(out), n)
    if compiled and _holds_pairs(z) and not op.use_triton(backend, z.device):
        twins.fill(twins.randn_pairs, (z.view(torch.int64),), (counter, n // 2), compiled)
    else:
        op.execute(randn_kernel, twins.randn, (z,), (counter, n), backend, compiled)


def randn_kernel(targets: tuple[Tensor], counter: Counter, n: int) -> None:
    """Fill contiguous [B, n] with noise-v1."""
    if targets[0].numel():
        from fastddpm.kernels.noise import randn_launch

        randn_launch(targets[0], op.dense(counter)).run()


def _holds_pairs(z: Tensor) -> bool:
    """Whether contiguous ``z`` can be filled two normals at a time."""
    n, offset = z.shape[1], int(z.storage_offset())
    pairs = z.numel() > 0 and n % 2 == 0 and n <= MAX_ELEMENTS and offset % 2 == 0
    return bool(pairs) and z.dtype == torch.float32 and sys.byteorder == "little"


def _draw(counter: Counter, batch: int, n: int, dtype: torch.dtype, backend: str, compiled: bool) -> Tensor:
    out = _empty(counter, batch, n, dtype)
    _fill(counter, out, backend, compiled)
    return out


def _empty(counter: Counter, batch: int, n: int, dtype: torch.dtype, *_: object) -> Tensor:
    return counter.seed.new_empty((batch, n), dtype=dtype)


_randn_out = op.define(f"randn_out({op.NOISE}, Tensor(a!) out, {op.HOW}) -> ()", _fill, lambda *_: None)
_randn = op.define(f"randn({op.NOISE}, SymInt batch, SymInt n, ScalarType dtype, {op.HOW}) -> Tensor", _draw, _empty)
