"""`accelerate` for live objects of denoising-diffusion-pytorch, and the steps of those that it does not take."""

from __future__ import annotations

from typing import Any, Unpack

from torch import nn

from fastddpm.integrations.lucidrains import tables
from fastddpm.integrations.lucidrains.diffusion import GaussianDiffusion
from fastddpm.integrations.lucidrains.process import ORIGINAL
from fastddpm.integrations.shared import check_options
from fastddpm.sampling.options import SamplerArguments
from fastddpm.tables.table import Table

_ORIGINAL_CLASS = ("denoising_diffusion_pytorch.denoising_diffusion_pytorch", "GaussianDiffusion")
_ADVICE = (
    "its network can be sampled alone, with the same steps and results in [-1, 1]. After "
    "`from fastddpm.integrations.lucidrains import table_of` that is "
    "`fastddpm.Sampler(diffusion.model, table_of(diffusion), shape)`, or, where it is classifier-free, "
    "`fastddpm.Sampler(lambda x, t, **classes: diffusion.model.forward_with_cond_scale(x, t, **classes)[0], "
    "table_of(diffusion), shape, device=diffusion.device)`, whose sample takes "
    "model_kwargs={'classes': ..., 'cond_scale': ..., 'rescaled_phi': ...}"
)
# What accelerate() takes over besides the buffers.
_ATTRIBUTES = (
    "channels",
    "image_size",
    "objective",
    "num_timesteps",
    "sampling_timesteps",
    "is_ddim_sampling",
    "ddim_sampling_eta",
    "offset_noise_strength",
    "normalize",
    "unnormalize",
)


def table_of(diffusion: Any) -> Table:
    """Return the T steps of `p_sample_loop` of any diffusion of denoising-diffusion-pytorch, for a `Sampler` of yours.

    Args:
        diffusion: a live object with the buffers of `GaussianDiffusion` and its `objective`, of any class.

    Returns:
        A table whose x_0 is clipped to [-1, 1]; samples are in [-1, 1] too.
    """
    return tables.ddpm_table({name: getattr(diffusion, name) for name in tables.BUFFERS}, diffusion.objective)


def accelerate(diffusion: nn.Module, **sampler_options: Unpack[SamplerArguments]) -> GaussianDiffusion:
    """Return a GaussianDiffusion of this module around the network and the buffers of a live instance.

    The network itself is shared, so training it further shows in both; the options are copied.

    Args:
        diffusion: a denoising_diffusion_pytorch.GaussianDiffusion, or one of this module.
        sampler_options: further arguments of `Sampler` for whole runs: compile, dtype, backend, ...

    Raises:
        TypeError: another class, a subclass included: what it changes would be lost.
        NotImplementedError: self-conditioning or immiscible training.
    """
    check_options(sampler_options)
    if isinstance(diffusion, GaussianDiffusion):
        diffusion.sampler_options.update(sampler_options)
        return diffusion
    kinds = [(kind.__module__, kind.__qualname__) for kind in type(diffusion).__mro__]
    if _ORIGINAL_CLASS not in kinds:
        raise TypeError(f"accelerate takes {ORIGINAL}, got {'.'.join(kinds[0])}; {_ADVICE}")
    if kinds[0] != _ORIGINAL_CLASS:
        raise TypeError(
            f"{'.'.join(kinds[0])} may change the step, which would be lost; derive it from "
            "fastddpm.integrations.lucidrains.GaussianDiffusion instead, and load the state_dict"
        )
    original: Any = diffusion
    fast = GaussianDiffusion(
        original.model,
        image_size=original.image_size,
        timesteps=original.num_timesteps,
        beta_schedule="cosine",
        objective=original.objective,
        immiscible=original.immiscible,
    )
    for name in _ATTRIBUTES:
        setattr(fast, name, getattr(original, name))
    for name in tables.BUFFERS:
        fast.register_buffer(name, getattr(original, name))
    fast.sampler_options.update(sampler_options)
    return fast.train(original.training)
