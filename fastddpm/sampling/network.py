"""The network as a step calls it: the model itself, or the form that its class has for sampling."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastddpm.errors import BackendUnavailable
from fastddpm.machine.building import Want
from fastddpm.machine.torch_compile import Compiled, own_code
from fastddpm.sampling.model import Model
from fastddpm.unet.forms import is_plain
from fastddpm.unet.inference import UNetForms
from fastddpm.unet.unet import UNet

# Compiled codes that are kept for other batch sizes than those of the steps in use.
MAX_NETWORKS = 8


class Network(Protocol):
    """What a step calls.

    A model may bring its own, made for sampling: it then has a method `sampling_networks(timesteps, *, compile_model,
    strict)`, with timesteps [R] on the model's device, which returns a function: rows of x -> Network. Every step has
    its own network, because it holds the labels of a run. One that knows its timesteps by row may set `reads_t` to
    False: t is then not looked up for it, and holds nothing. One that keeps nothing made from weights may set
    `shares_weights` to True: their bytes are then not compared before each run. One whose code another process compiles
    sets `compiles_step` to False, for compiling the rest of a step would take seconds of this one; and it has a method
    `settle(x, compiled)`, which decides for all later runs whether compiled code runs (None: by what is there), makes
    it ready, and returns the decision.
    """

    memory_format: torch.memory_format
    """Layout in which the network wants x."""

    def load(self, class_labels: Tensor | None) -> None:
        """Learn the labels of the next run, before its first step; the place to fill tables in static buffers."""

    def __call__(self, x: Tensor, t: Tensor, row: Tensor, kwargs: Mapping[str, Any]) -> Any:
        """Predict from x [B, ...] (the network's dtype), t [B] and row [1], the index of t in the timesteps."""


class ModelNetwork:
    """Any model that keeps the contract model(x, t, **kwargs) -> tensor, or an object with `.sample`.

    Args:
        model: the model.
        compile_model: run it through torch.compile.
        strict: raise where that fails, instead of running uncompiled.
        dynamic: whether sizes are left open, see torch.compile.
    """

    memory_format = torch.contiguous_format
    shares_weights = True

    def __init__(self, model: Model, *, compile_model: bool, strict: bool, dynamic: bool | None = None) -> None:
        # Of its own: Dynamo does not look again at hooks of what it has compiled.
        def call(*args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

        self._call = Compiled(own_code(call), strict=strict, dynamic=dynamic) if compile_model else model

    def load(self, class_labels: Tensor | None) -> None:
        """Nothing to do: labels reach the model as a keyword argument."""

    def __call__(self, x: Tensor, t: Tensor, row: Tensor, kwargs: Mapping[str, Any]) -> Any:
        return self._call(x, t, **kwargs)


def sampling_networks(
    model: Model, timesteps: Tensor, *, want: Want, strict: bool, compiled: Path | None = None
) -> Callable[[int], Network]:
    """Return what makes a model's networks for sampling: rows of x -> Network.

    Args:
        model: on its device and in its dtype, see `model.place`; not changed.
        timesteps: [R], what the rows of the table ask for, on the model's device.
        want: how much compiled code is wanted.
        strict: raise where it is wanted now and cannot be had, instead of running uncompiled.
        compiled: a package to take it from.

    Raises:
        BackendUnavailable: the model is no `UNet`, and a package was given.
    """
    if isinstance(model, UNet) and is_plain(model):
        return UNetForms(model, timesteps, want=want, strict=strict, file=compiled)
    if compiled is not None:
        raise BackendUnavailable(f"compiled={str(compiled)!r} is for a fastddpm.UNet, not for {type(model).__name__}")
    own_form = getattr(model, "sampling_networks", None)
    if own_form is not None:
        return own_form(timesteps, compile_model=want is Want.NOW, strict=strict)
    if want is Want.NOW and timesteps.device.type == "cuda":
        # Where the batch size is left open, Inductor gives up its channels-last layouts.
        make = functools.partial(ModelNetwork, model, compile_model=True, strict=strict, dynamic=False)
        return functools.lru_cache(MAX_NETWORKS)(lambda batch: make())
    shared = ModelNetwork(model, compile_model=want is Want.NOW, strict=strict)
    return lambda batch: shared
