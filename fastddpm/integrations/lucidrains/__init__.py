"""The drop-in for denoising-diffusion-pytorch."""

from fastddpm.integrations.lucidrains.accelerate import accelerate, table_of
from fastddpm.integrations.lucidrains.diffusion import GaussianDiffusion

__all__ = ["GaussianDiffusion", "accelerate", "table_of"]
