"""fastddpm: a drop-in, high-performance sampler for denoising diffusion probabilistic models."""

__version__ = "0.1.0"
