"""Which tensors of a fused step may share memory: each kernel reads and writes an element once, in no fixed order."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def check_overlap(inputs: Mapping[str, Tensor | None], outputs: Mapping[str, Tensor | None]) -> None:
    """Refuse outputs that overlap themselves, each other, or an input other than element by element.

    Args:
        inputs, outputs: tensors by their argument's name; None is skipped.

    Raises:
        ValueError: naming the arguments.
    """
    seen: list[tuple[str, Tensor]] = []
    for name, out in outputs.items():
        if out is None or out.numel() == 0:
            continue
        if overlaps_itself(out):
            raise ValueError(f"{name} overlaps itself (strides {out.stride()}); pass a tensor that owns its elements")
        for other, tensor in inputs.items():
            if tensor is not None and _overlap(out, tensor) and not _same_elements(out, tensor):
                raise ValueError(f"{name} partly overlaps {other}; pass {other} itself or memory of its own")
        for other, tensor in seen:
            if _overlap(out, tensor):
                raise ValueError(f"{name} and {other} overlap; each output needs memory of its own")
        seen.append((name, out))


def overlaps_itself(x: Tensor) -> bool:
    """Tell whether two indices may share an element, judged from sizes and strides (an odd stride may be refused)."""
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _span(x: Tensor) -> tuple[int, int]:
    start = x.data_ptr()
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return start, start + (last + 1) * x.element_size()


def _overlap(x: Tensor, y: Tensor) -> bool:
    if x.device != y.device or x.numel() == 0 or y.numel() == 0:
        return False
    (x_start, x_end), (y_start, y_end) = _span(x), _span(y)
    return x_start < y_end and y_start < x_end


def _same_elements(out: Tensor, x: Tensor) -> bool:
    """Whether out is x, or the first part of x along the batch (of a guided network's two halves)."""
    same = out.data_ptr() == x.data_ptr() and out.dtype == x.dtype
    if not same or out.shape[1:] != x.shape[1:] or out.shape[0] > x.shape[0]:
        return False
    return all(i == j for i, j, size in zip(out.stride(), x.stride(), out.shape, strict=True) if size > 1)
