"""Drop-in replacements for other libraries. Each is imported when first used, and needs only what it replaces."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, TypeVar, Unpack

if TYPE_CHECKING:
    from fastddpm.sampling.options import SamplerArguments

T = TypeVar("T")

_INTEGRATIONS = {
    "diffusers": "fastddpm.integrations.diffusers",
    "denoising_diffusion_pytorch": "fastddpm.integrations.lucidrains",
    "improved_diffusion": "fastddpm.integrations.openai",
    "guided_diffusion": "fastddpm.integrations.openai",
}


def accelerate(target: T, **options: Unpack[SamplerArguments]) -> T:
    """Return the fast form of a pipeline or scheduler of diffusers, or of lucidrains' or OpenAI's GaussianDiffusion.

    It has the original's methods, arguments and results; see `accelerate` of `fastddpm.integrations.diffusers`,
    `.lucidrains` and `.openai`. The network is shared, not copied.

    Args:
        target: the live object.
        **options: further arguments of `Sampler`, where the fast form runs whole loops: compile, backend, ...

    Raises:
        TypeError: nothing here can accelerate it, or it takes no such option.
    """
    for base in type(target).__mro__:
        integration = _INTEGRATIONS.get(base.__module__.partition(".")[0])
        if integration is not None:
            return importlib.import_module(integration).accelerate(target, **options)
    raise TypeError(
        f"cannot accelerate {type(target).__module__}.{type(target).__qualname__}; pass a pipeline or scheduler of "
        "diffusers, or a GaussianDiffusion of denoising_diffusion_pytorch, improved_diffusion or guided_diffusion"
    )
