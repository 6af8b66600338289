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

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "SpacedDiffusion",
    "accelerate",
    "betas_for_alpha_bar",
    "get_named_beta_schedule",
    "space_timesteps",
]
