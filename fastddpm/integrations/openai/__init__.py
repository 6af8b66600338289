"""The drop-in for improved-diffusion and guided-diffusion."""

from fastddpm.integrations.openai.diffusion import GaussianDiffusion, SpacedDiffusion, accelerate
from fastddpm.integrations.openai.resample import (
    LossSecondMomentResampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from fastddpm.integrations.openai.tables import (
    LossType,
    ModelMeanType,
    ModelVarType,
    betas_for_alpha_bar,
    get_named_beta_schedule,
    space_timesteps,
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
