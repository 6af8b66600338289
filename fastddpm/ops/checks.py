"""Checks that the doors of the fused operations share, of dtype, device, shape and memory; no tensor's value is read.

The kernels take memory that is contiguous, or channels-last of any dimension, as it is, and read and write an element
once, in no fixed order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastddpm.noise.v1 import Counter

# Where a tensor lies: its device, the address of its first byte and the one after its last.
_Span = tuple[torch.device, int, int]

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
            f"{', '.join(names)} requires a gradient, but what is written into given tensors has none; call it "
            "under torch.no_grad(), or without the tensors to write into"
        )


def is_channels_last(x: Tensor) -> bool:
    """Whether x [B, C, ...] is dense with its channels innermost, and not contiguous as well."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def empty_as(x: Tensor) -> Tensor:
    """Return a new tensor of x's shape: channels-last where x is, else contiguous."""
    return torch.empty_like(x) if is_channels_last(x) else x.new_empty(x.shape)


def check_overlap(inputs: Mapping[str, Tensor | None], outputs: Mapping[str, Tensor | None]) -> None:
    """Refuse outputs that overlap themselves, each other, or an input other than element by element.

    Args:
        inputs, outputs: tensors by their argument's name; None is skipped.

    Raises:
        ValueError: naming the arguments.
    """
    read = [(name, x, _span(x)) for name, x in inputs.items() if x is not None and x.numel()]
    written: list[tuple[str, _Span]] = []
    for name, out in outputs.items():
        if out is None or out.numel() == 0:
            continue
        if overlaps_itself(out):
            raise ValueError(f"{name} overlaps itself (strides {out.stride()}); pass a tensor that owns its elements")
        span = _span(out)
        for other, x, other_span in read:
            if _meet(span, other_span) and not _same_elements(out, x):
                raise ValueError(f"{name} partly overlaps {other}; pass {other} itself or memory of its own")
        for other, other_span in written:
            if _meet(span, other_span):
                raise ValueError(f"{name} and {other} overlap; each output needs memory of its own")
        written.append((name, span))


def overlaps_itself(x: Tensor) -> bool:
    """Tell whether two indices may share an element, judged from sizes and strides (an odd stride may be refused)."""
    if x.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _span(x: Tensor) -> _Span:
    last = x.numel() - 1
    if not x.is_contiguous():
        last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    start = x.data_ptr()
    return x.device, start, start + (last + 1) * x.element_size()


def _meet(a: _Span, b: _Span) -> bool:
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


def _same_elements(out: Tensor, x: Tensor) -> bool:
    """Whether out is x, or the first part of x along the batch (of a guided network's two halves)."""
    same = out.data_ptr() == x.data_ptr() and out.dtype == x.dtype
    if not same or out.shape[1:] != x.shape[1:] or out.shape[0] > x.shape[0]:
        return False
    return all(i == j for i, j, size in zip(out.stride(), x.stride(), out.shape, strict=True) if size > 1)
