"""A model as its user wrote it, and as a step calls it: itself, or the form that its class has for sampling."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastddpm.errors import BackendUnavailable
from fastddpm.machine.building import Want, Wish
from fastddpm.machine.torch_compile import compile_call
from fastddpm.sampling.changes import Model, modules_of
from fastddpm.sampling.kept import KeptNetwork
from fastddpm.schedules.diffusion import LEARNED, DiffusionConfig
from fastddpm.unet.forms import is_plain
from fastddpm.unet.inference import UNetForms
from fastddpm.unet.unet import UNet

logger = logging.getLogger("fastddpm")

# Compiled codes that are kept for other batch sizes than those of the steps in use.
MAX_NETWORKS = 8


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


def shape_of(model: Model, diffusion: DiffusionConfig | None = None) -> tuple[int, ...]:
    """Return one sample's shape from the model's config: (channels, *sample_size).

    A network returns them twice where it learns the variance, and takes more where a condition lies beside x.

    Raises:
        ValueError: the config does not say.
    """
    config = getattr(model, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if not isinstance(channels, int) or size is None:
        raise ValueError("the model's config does not name a shape: pass shape=(C, H, W), or (D,) for points")
    learned = (diffusion or diffusion_of(model)).variance_type in LEARNED
    out = getattr(config, "out_channels", channels) // (1 + learned)
    height, width = (size, size) if isinstance(size, int) else size
    return (min(channels, out), height, width)


def diffusion_of(model: Model, given: DiffusionConfig | None = None) -> DiffusionConfig:
    """Return what is given, else `model.diffusion`, else Ho et al.'s, saying so at INFO.

    Raises:
        TypeError: it is no `DiffusionConfig`.
    """
    config = getattr(model, "diffusion", None) if given is None else given
    if config is None:
        logger.info("the model names no diffusion: taking Ho et al.'s (linear betas, 1000 timesteps, epsilon)")
        return DiffusionConfig()
    if not isinstance(config, DiffusionConfig):
        raise TypeError(
            f"{'model.diffusion' if given is None else 'diffusion'} must be a DiffusionConfig, got "
            f"{type(config).__name__}; pass diffusion=DiffusionConfig(...), or what "
            "DiffusionConfig.from_scheduler_config reads from a diffusers scheduler's config"
        )
    return config


def unwrap(output: Any) -> Any:
    """Return the tensor in the model's output: itself, or its `.sample` (diffusers' UNet2DOutput)."""
    return output if isinstance(output, Tensor) else getattr(output, "sample", output)


class Network:
    """What a step calls: any model with the contract model(x, t, **kwargs) -> tensor, or an object with `.sample`.

    A model may bring others, made for sampling: it then has a method `sampling_networks(timesteps, *, compile_model,
    strict)`, with timesteps [R] on the model's device, which returns a function: rows of x -> an object with this one's
    `memory_format`, `load` and call. Every step has its own, because it holds the labels of a run. One that knows its
    timesteps by row may set `reads_t` to False: t is then not looked up for it, and holds nothing. One that keeps
    nothing made from weights may set `shares_weights` to True: their bytes are then not compared before each run. One
    whose code another process compiles sets `compiles_step` to False, for compiling the rest of a step would take
    seconds of this one; and it has a method `settle(x, t, kwargs, compiled)`, which decides for all later runs whether
    compiled code runs (None: by what is there), makes it ready, and returns the decision.

    Args:
        strict: raise where that fails, instead of running uncompiled.
        dynamic: whether sizes are left open, see torch.compile.
        weights: what it runs with instead of its own, by name.

    Attributes:
        memory_format: the layout in which it wants x.
    """

    memory_format = torch.contiguous_format
    shares_weights = True

    def __init__(
        self,
        model: Model,
        *,
        compile_model: bool,
        strict: bool,
        dynamic: bool | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        # Of its own: Dynamo does not look again at hooks of what it has compiled.
        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, weights, args, kwargs) if weights else model(*args, **kwargs)  # type: ignore[arg-type]

        if weights:
            self.shares_weights = False
        self._call = compile_call(call, strict=strict, dynamic=dynamic) if compile_model else model

    def load(self, class_labels: Tensor | None) -> None:
        """Learn the labels of the next run, before its first step; here they are a keyword argument of the model."""

    def __call__(self, x: Tensor, t: Tensor, row: Tensor, kwargs: Mapping[str, Any]) -> Any:
        """Predict from x [B, ...] (the network's dtype), t [B] and row [1], the index of t in the timesteps."""
        return self._call(x, t, **kwargs)


def sampling_networks(
    model: Model, timesteps: Tensor, *, want: Want, strict: bool, compiled: Path | None = None, fused: bool = False
) -> Callable[[int], Any]:
    """Return what makes a model's networks for sampling: rows of x -> `Network`, or its like.

    Args:
        model: on its device and in its dtype, see `place`; not changed.
        timesteps: [R], what the rows of the table ask for, on the model's device.
        strict: raise where it is wanted now and cannot be had, instead of running uncompiled.
        fused: see `Sampler`'s norm.

    Raises:
        BackendUnavailable: the model is no plain `UNet`, and a package was given, or fused normalisation asked for.
    """
    # A wrapper around a model in evaluation mode is new, and so in training mode, itself.
    if any(module.training for module in modules_of(model) if not module._modules):
        logger.warning("the model is in training mode: dropout and batch statistics act; call model.eval() to sample")
    device = timesteps.device.type
    if fused and not (device == "cuda" and isinstance(model, UNet) and is_plain(model)):
        raise BackendUnavailable(
            f"norm='fused' is for a fastddpm.UNet on CUDA without hooks or replaced layers, not for "
            f"{type(model).__name__} on {device}; leave it out"
        )
    if isinstance(model, UNet) and is_plain(model):
        return UNetForms(model, timesteps, want=want, strict=strict, file=compiled, fuse=fused)
    own_form = getattr(model, "sampling_networks", None)
    if own_form is not None and compiled is None:
        return own_form(timesteps, compile_model=want is Want.NOW, strict=strict)
    # What is wanted in any case is compiled in this process, for all batch sizes at once.
    kept = compiled is not None or (want >= Want.FOR_LATER and not strict)
    if isinstance(model, nn.Module) and device == "cpu" and own_form is None and kept:
        wish = Wish(want, strict, compiled)
        return lambda batch: KeptNetwork(model, wish)
    if compiled is not None:
        raise BackendUnavailable(f"compiled={str(compiled)!r} is for a module on a CPU, not for {type(model).__name__}")
    if want is Want.NOW and device == "cuda":
        # Where the batch size is left open, Inductor gives up its channels-last layouts.
        make = functools.partial(Network, model, compile_model=True, strict=strict, dynamic=False)
        weights = channels_last_weights(model)
        return functools.lru_cache(MAX_NETWORKS)(lambda batch: make(weights=weights))
    shared = Network(model, compile_model=want is Want.NOW, strict=strict)
    return lambda batch: shared


def channels_last_weights(model: Model) -> dict[str, Tensor]:
    """Return the weights of a module's 2-D convolutions by name, in the layout into which Inductor copies them.

    It copies those of another layout in every call.
    """
    if not isinstance(model, nn.Module):
        return {}
    convolved = {id(module._parameters.get("weight")) for module in model.modules() if isinstance(module, nn.Conv2d)}
    return {
        name: weight.detach().contiguous(memory_format=torch.channels_last)
        for name, weight in model.named_parameters()
        if id(weight) in convolved and type(weight) is nn.Parameter
    }
