"""The drop-in for denoising-diffusion-pytorch."""

from fastddpm.integrations.lucidrains.accelerate import accelerate, table_of
from fastddpm.integrations.lucidrains.diffusion import GaussianDiffusion
from fastddpm.integrations.lucidrains.one_dimensional import GaussianDiffusion1D

__all__ = ["GaussianDiffusion", "GaussianDiffusion1D", "accelerate", "table_of"]
