"""`accelerate` for live objects of denoising-diffusion-pytorch, and the steps of those that it does not take."""

from __future__ import annotations

import inspect
from typing import Any, Unpack

from torch import nn

from fastddpm.integrations.lucidrains import classifier_free_guidance, tables
from fastddpm.integrations.lucidrains.diffusion import GaussianDiffusion
from fastddpm.integrations.lucidrains.one_dimensional import GaussianDiffusion1D
from fastddpm.integrations.shared import check_options
from fastddpm.sampling.options import SamplerArguments
from fastddpm.tables.table import Table

_PACKAGE = "denoising_diffusion_pytorch"
_CLASSES: dict[tuple[str, str], type[GaussianDiffusion]] = {
    (f"{_PACKAGE}.denoising_diffusion_pytorch", "GaussianDiffusion"): GaussianDiffusion,
    (f"{_PACKAGE}.denoising_diffusion_pytorch_1d", "GaussianDiffusion1D"): GaussianDiffusion1D,
    (f"{_PACKAGE}.classifier_free_guidance", "GaussianDiffusion"): classifier_free_guidance.GaussianDiffusion,
}
# For diffusions with the same buffers.
_ADVICE = (
    "; its network can be sampled alone, with the same steps and results in [-1, 1]: after "
    "`from fastddpm.integrations.lucidrains import table_of` that is "
    "`fastddpm.Sampler(diffusion.model, table_of(diffusion), shape)`, whose sample takes mask= (1 where to draw) and "
    "known= for inpainting"
)
# What accelerate() takes over besides the constructor's arguments and the buffers.
_ATTRIBUTES = ("channels", "is_ddim_sampling", "normalize", "unnormalize")


def table_of(diffusion: Any) -> Table:
    """Return the T steps of `p_sample_loop` of any diffusion of denoising-diffusion-pytorch, for a `Sampler` of yours.

    Args:
        diffusion: a live object with the buffers of `GaussianDiffusion` and its `objective`, of any class.

    Returns:
        A table whose x_0 is clipped to [-1, 1]; samples are in [-1, 1] too.
    """
    return tables.ddpm_table({name: getattr(diffusion, name) for name in tables.BUFFERS}, diffusion.objective)


def accelerate(diffusion: nn.Module, **sampler_options: Unpack[SamplerArguments]) -> GaussianDiffusion:
    """Return the class of this package that equals a live diffusion's, around its network and buffers.

    The network itself is shared, so training it further shows in both; the options are copied.

    Args:
        diffusion: one of denoising_diffusion_pytorch's GaussianDiffusion, GaussianDiffusion1D and the GaussianDiffusion
            of its classifier_free_guidance, or a diffusion of this package.
        sampler_options: further arguments of `Sampler` for whole runs: compile, dtype, backend, ...

    Raises:
        TypeError: another class, a subclass included: what it changes would be lost.
        NotImplementedError: immiscible training or CFG++.
    """
    check_options(sampler_options)
    if isinstance(diffusion, GaussianDiffusion):
        diffusion.sampler_options.update(sampler_options)
        return diffusion
    kinds = [(kind.__module__, kind.__qualname__) for kind in type(diffusion).__mro__]
    known = [_CLASSES[kind] for kind in kinds if kind in _CLASSES]
    if not known:
        takes = ", ".join(".".join(kind) for kind in _CLASSES)
        advice = _ADVICE if all(hasattr(diffusion, name) for name in (*tables.BUFFERS, "objective", "model")) else ""
        raise TypeError(f"accelerate takes {takes}; got {'.'.join(kinds[0])}{advice}")
    if kinds[0] not in _CLASSES:
        raise TypeError(
            f"{'.'.join(kinds[0])} may change the step, which would be lost; derive it from "
            f"{known[0].__module__}.{known[0].__qualname__} instead, and load the state_dict"
        )
    original: Any = diffusion
    names = {**inspect.signature(GaussianDiffusion).parameters, **inspect.signature(known[0]).parameters}
    arguments = {name: getattr(original, name) for name in names if hasattr(original, name)}
    # Whatever its betas, those of the buffers below count.
    fast = known[0](**arguments, timesteps=original.num_timesteps, beta_schedule="cosine")
    for name in _ATTRIBUTES:
        setattr(fast, name, getattr(original, name, getattr(fast, name)))
    for name in tables.BUFFERS:
        fast.register_buffer(name, getattr(original, name))
    fast.sampler_options.update(sampler_options)
    return fast.train(original.training)
