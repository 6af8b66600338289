"""A model as its user wrote it: what it reveals of itself, a copy where another device or dtype is asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Model = Callable[..., Any]


def place(model: Model, device: torch.device, dtype: torch.dtype | None) -> Model:
    """Return the model on `device` in `dtype`: itself if it is there already, else a converted copy.

    A module whose parameters are of several dtypes keeps them, and so does every one where `dtype` is None; buffers in
    float64 stay so. A plain callable is returned as it is: it receives x on `device` and sees to the rest.
    """
    if not isinstance(model, nn.Module):
        return model
    parameters, buffers = list(model.parameters()), list(model.buffers())
    if len({p.dtype for p in parameters if p.is_floating_point()}) > 1:
        dtype = None
    converted: list[Tensor] = [t for t in parameters if t.is_floating_point()]
    converted += [t for t in buffers if t.is_floating_point() and t.dtype != torch.float64]
    moved = any(t.device != device for t in [*parameters, *buffers])
    if not moved and (dtype is None or all(t.dtype == dtype for t in converted)):
        return model
    placed = copy.deepcopy(model).to(device=device, dtype=dtype)
    for original, module in zip(model.modules(), placed.modules(), strict=True):
        for name, buffer in original.named_buffers(recurse=False):
            if buffer.dtype == torch.float64:
                setattr(module, name, buffer.to(device))
    return placed


def dtype_of(model: Model) -> torch.dtype:
    """Return the dtype of the model's first floating-point parameter; float32 where it has none."""
    if isinstance(model, nn.Module):
        for tensor in model.parameters():
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32


def device_of(model: Model) -> torch.device:
    """Return the device of the model's first parameter or buffer; the CPU where it has none."""
    if isinstance(model, nn.Module):
        for tensor in [*model.parameters(), *model.buffers()]:
            return tensor.device
    return torch.device("cpu")


def null_class_of(model: Model) -> int | None:
    """Return the label that means "no class", from `model.null_class` or `model.config.null_class`."""
    value = getattr(model, "null_class", None)
    return getattr(getattr(model, "config", None), "null_class", None) if value is None else value


def num_labels_of(model: Model) -> int | None:
    """Return how many labels the model knows, its null class included; None where it does not say."""
    value = getattr(getattr(model, "config", None), "num_class_embeds", None)
    return value if isinstance(value, int) else None


def num_classes_of(model: Model) -> int | None:
    """Return how many real classes the model knows, its null class not included; None where it does not say."""
    labels = num_labels_of(model)
    return None if labels is None else labels - (null_class_of(model) is not None)


def unwrap(output: Any) -> Any:
    """Return the tensor in the model's output: itself, or its `.sample` (diffusers' UNet2DOutput)."""
    return output if isinstance(output, Tensor) else getattr(output, "sample", output)
