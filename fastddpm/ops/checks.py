"""Checks that the doors of the fused operations share: dtype, device, shape; no tensor's value is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm.noise.v1 import Counter

# What states, network outputs and copies are stored in.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise TypeError for what no operation stores."""
    if dtype not in DTYPES:
        hint = "; for float64 use fastddpm.reference" if dtype == torch.float64 else ""
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {dtype}{hint}")


def check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise unless a tensor has x's shape and device, and a dtype of its own that can be stored."""
    check_dtype(name, tensor.dtype)
    check_device(name, tensor, x.device)
    if tensor.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, x has {tuple(x.shape)}; nothing is broadcast")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError for a tensor elsewhere."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but x is on {device}; move one of them")


def _check_indices(name: str, index: Tensor, batch: int, device: torch.device) -> None:
    check_device(name, index, device)
    if index.dtype != torch.int64 or index.dim() != 1 or index.shape[0] not in (1, batch):
        raise ValueError(f"{name} must be int64 [1] or [{batch}], got {index.dtype} {list(index.shape)}")


def check_counter(counter: Counter, batch: int, device: torch.device) -> None:
    """Raise ValueError unless each word of a counter is int64, one for all samples or one each."""
    for name, tensor in (("seed", counter.seed), ("sample_id", counter.sample_id), ("step", counter.step)):
        _check_indices(name, tensor, batch, device)


def check_rows(rows: Tensor, row: Tensor, x: Tensor, columns: int) -> None:
    """Raise ValueError unless x has samples, rows is a table with that many columns, and row an index into it."""
    if x.dim() == 0:
        raise ValueError("x must be [B, ...], samples first, got a scalar")
    check_device("rows", rows, x.device)
    if rows.dtype != torch.float32 or rows.dim() != 2 or rows.shape[1] != columns or rows.shape[0] == 0:
        raise ValueError(f"rows must be float32 [R, {columns}] with R >= 1, got {rows.dtype} {list(rows.shape)}")
    _check_indices("row", row, x.shape[0], x.device)


def check_output(m: Tensor, x_t: Tensor, learned: bool, guided: bool = False) -> None:
    """Raise unless m is what a network of this kind returns for x_t."""
    check_dtype("m, the network's output,", m.dtype)
    check_device("m, the network's output,", m, x_t.device)
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


def refuse_gradients(tensors: dict[str, Any]) -> None:
    """Raise RuntimeError where a gradient would be lost."""
    if not torch.is_grad_enabled():
        return
    names = [name for name, t in tensors.items() if isinstance(t, Tensor) and t.requires_grad]
    if names:
        raise RuntimeError(
            f"{', '.join(names)} requires a gradient, but a step that writes into given tensors has none; call it "
            "under torch.no_grad(), or without out, x0_out and low_out"
        )
