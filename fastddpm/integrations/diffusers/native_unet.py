"""diffusers' UNet2DModel in this library's form, where it has one: the same parameters, nothing copied."""

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from fastddpm.unet.unet import UNet, UNetConfig

logger = logging.getLogger("fastddpm")


def native_unet(unet: Any) -> UNet | None:
    """Return a `UNet` that shares the parameters of a UNet2DModel, or None where it would not compute the same.

    That is: another class, a feature that `UNetConfig` does not have, layers that were replaced (adapters, quantised or
    fused weights), hooks, an attention processor of the caller's, or a compiled module.
    """
    if type(unet) is not UNet2DModel or any(_is_altered(module) for module in unet.modules()):
        return None
    try:
        config = UNetConfig.from_dict(dict(unet.config))
    except (ValueError, TypeError) as error:
        logger.info("the UNet2DModel runs as it is: %s", error)
        return None
    with torch.device("meta"):
        native = UNet(config, zero_init=False)
    parameters = dict(unet.named_parameters())
    if not _have_equal_state(unet, native):
        logger.info("the UNet2DModel runs as it is: its parameters are not those of its configuration")
        return None
    for name in [name for name, _ in native.named_parameters()]:
        owner, _, last = name.rpartition(".")
        setattr(native.get_submodule(owner), last, parameters[name])
    return native.train(unet.training)


def shares_parameters(native: nn.Module, unet: nn.Module) -> bool:
    """Whether both still hold the very same parameters, in the same mode, and the UNet is still unaltered."""
    ours, theirs = dict(native.named_parameters()), dict(unet.named_parameters())
    if ours.keys() != theirs.keys() or any(ours[name] is not theirs[name] for name in ours):
        return False
    return native.training == unet.training and not any(_is_altered(module) for module in unet.modules())


def _have_equal_state(unet: nn.Module, native: nn.Module) -> bool:
    theirs, ours = unet.state_dict(keep_vars=True), native.state_dict(keep_vars=True)
    shapes = {name: tensor.shape for name, tensor in theirs.items()}
    are_parameters = all(isinstance(tensor, nn.Parameter) for tensor in theirs.values())
    one_dtype = len({tensor.dtype for tensor in theirs.values()}) == 1
    return are_parameters and one_dtype and shapes == {name: tensor.shape for name, tensor in ours.items()}


def _is_altered(module: nn.Module) -> bool:
    """Whether somebody changed what calling this module does."""
    if "forward" in vars(module) or hasattr(module, "_hf_hook") or module._compiled_call_impl is not None:
        return True
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)):
        return True
    processor = getattr(module, "processor", None)
    return processor is not None and type(processor) not in (AttnProcessor, AttnProcessor2_0)
