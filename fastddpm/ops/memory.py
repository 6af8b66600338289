"""Which memory the kernels take as it is: contiguous, or channels-last of any dimension; and what may share it.

A kernel reads and writes an element once, in no fixed order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Where a tensor lies: its device, the address of its first byte and the one after its last.
_Span = tuple[torch.device, int, int]


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
