"""The drop-in for denoising-diffusion-pytorch."""

from fastddpm.integrations.lucidrains.diffusion import GaussianDiffusion, accelerate

__all__ = ["GaussianDiffusion", "accelerate"]
