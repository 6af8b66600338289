"""The drop-in for improved-diffusion and guided-diffusion."""

from fastddpm.integrations.openai.diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    accelerate,
    betas_for_alpha_bar,
    get_named_beta_schedule,
    space_timesteps,
)
from fastddpm.integrations.openai.resample import (
    LossSecondMomentResampler,
    UniformSampler,
    create_named_schedule_sampler,
)

__all__ = [
    "GaussianDiffusion",
    "LossSecondMomentResampler",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "SpacedDiffusion",
    "UniformSampler",
    "accelerate",
    "betas_for_alpha_bar",
    "create_named_schedule_sampler",
    "get_named_beta_schedule",
    "space_timesteps",
]
