"""Drop-ins for diffusers: seven of its schedulers and two pipelines, with their arithmetic in fused operations.

    pipe.scheduler = FastDDPMScheduler.from_config(pipe.scheduler.config)     any pipeline, step by step
    pipe = fastddpm.accelerate(pipe)                                          DDPMPipeline, DDIMPipeline: the whole loop

Steps of DPM-Solver++, UniPC and the Euler schedulers are what diffusers' own step makes of unit vectors (see `linear`).
For DDPM and DDIM, rows are made in diffusers' float32 arithmetic and noise is drawn by its own function, so that a
float32 step differs by at most 1e-6 of the largest value (measured: 3e-7, and 0 for "sample" and "v_prediction" in
DDPM), draws the same numbers, and images agree to rounding. What diffusers saves loads here, and the other way round,
also where there is no fastddpm. docs/drop-in.md lists what is reproduced because images depend on it, what is mended
because nobody can depend on it, and what differs.
"""

from __future__ import annotations

from fastddpm.integrations.diffusers.accelerate import accelerate
from fastddpm.integrations.diffusers.native_unet import native_unet
from fastddpm.integrations.diffusers.pipelines import FastDDIMPipeline, FastDDPMPipeline
from fastddpm.integrations.diffusers.repaint import FastRePaintScheduler
from fastddpm.integrations.diffusers.schedulers import (
    FastDDIMScheduler,
    FastDDPMScheduler,
    FastDPMSolverMultistepScheduler,
    FastEulerAncestralDiscreteScheduler,
    FastEulerDiscreteScheduler,
    FastUniPCMultistepScheduler,
)

__all__ = [
    "FastDDIMPipeline",
    "FastDDIMScheduler",
    "FastDDPMPipeline",
    "FastDDPMScheduler",
    "FastDPMSolverMultistepScheduler",
    "FastEulerAncestralDiscreteScheduler",
    "FastEulerDiscreteScheduler",
    "FastRePaintScheduler",
    "FastUniPCMultistepScheduler",
    "accelerate",
    "native_unet",
]
