"""The network as a sampler calls it: on its device and dtype, compiled where that pays, its output unwrapped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastddpm.machine.torch_compile import Compiled

Model = Callable[..., Any]


class Network(Protocol):
    """What a step calls.

    A model may bring its own, made for sampling: it then has a method `sampling_networks(timesteps, *, compile_model,
    strict)`, with timesteps [R] on the model's device, which returns a function: rows of x -> Network. Every program
    has its own network, because it holds the labels of a run. One that knows its timesteps by row may set `reads_t` to
    False: t is then not looked up for it, and holds nothing.
    """

    memory_format: torch.memory_format
    """Layout in which the network wants x."""

    def load(self, class_labels: Tensor | None) -> None:
        """Learn the labels of the next run, before its first step; the place to fill tables in static buffers."""

    def __call__(self, x: Tensor, t: Tensor, row: Tensor, kwargs: Mapping[str, Any]) -> Any:
        """Predict from x [B, ...] (the network's dtype), t [B] and row [1], the index of t in the timesteps."""


class ModelNetwork:
    """Any model that keeps the contract model(x, t, **kwargs) -> tensor, or an object with `.sample`."""

    memory_format = torch.contiguous_format

    def __init__(self, model: Model, *, compile_model: bool, strict: bool) -> None:
        self._call = Compiled(model, strict=strict) if compile_model else model

    def load(self, class_labels: Tensor | None) -> None:
        """Nothing to do: labels reach the model as a keyword argument."""

    def __call__(self, x: Tensor, t: Tensor, row: Tensor, kwargs: Mapping[str, Any]) -> Any:
        return self._call(x, t, **kwargs)


class NetworkSource:
    """Hands out the network for a batch size: the model's own sampling form, or the model as it is, shared by all."""

    def __init__(self, model: Model, timesteps: Tensor, *, compile_model: bool, strict: bool) -> None:
        own_form = getattr(model, "sampling_networks", None)
        if own_form is not None:
            self._make: Callable[[int], Network] = own_form(timesteps, compile_model=compile_model, strict=strict)
        else:
            shared = ModelNetwork(model, compile_model=compile_model, strict=strict)
            self._make = lambda batch: shared

    def for_batch(self, batch: int) -> Network:
        """Return the network for inputs of `batch` rows."""
        return self._make(batch)


def place(model: Model, device: torch.device, dtype: torch.dtype) -> Model:
    """Return the model on `device` in `dtype`: itself if it is there already, else a converted copy.

    A plain callable is returned as it is: it receives x on `device` in `dtype` and sees to the rest.
    """
    if not isinstance(model, nn.Module):
        return model
    floats = [p for p in [*model.parameters(), *model.buffers()] if p.is_floating_point()]
    moved = any(p.device != device for p in [*model.parameters(), *model.buffers()])
    if not moved and all(p.dtype == dtype for p in floats):
        return model
    return copy.deepcopy(model).to(device=device, dtype=dtype)


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


def fingerprint(model: Model) -> tuple[Any, ...]:
    """Return what changes when weights are loaded, replaced, moved or converted, or the mode is switched.

    In-place writes through `.data` or under another view leave no trace in it.
    """
    if not isinstance(model, nn.Module):
        return ()
    tensors = [*model.parameters(), *model.buffers()]
    # Tensors made under inference_mode count no versions.
    return (
        *(module.training for module in model.modules()),
        *((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.shape) for t in tensors),
    )


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
