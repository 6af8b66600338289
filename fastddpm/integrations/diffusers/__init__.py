"""Drop-ins for diffusers: seven of its schedulers and two pipelines, with their arithmetic in fused operations.

    pipe.scheduler = FastDDPMScheduler.from_config(pipe.scheduler.config)     any pipeline, step by step
    pipe = fastddpm.accelerate(pipe)                                          DDPMPipeline, DDIMPipeline: the whole loop

Steps of DPM-Solver++, UniPC and the Euler schedulers are what diffusers' own step makes of unit vectors (see `linear`).
For DDPM and DDIM, rows are made in diffusers' float32 arithmetic and noise is drawn by its own function, so that a
float32 step differs by at most 1e-6 of the largest value (measured: 3e-7, and 0 for "sample" and "v_prediction" in
DDPM), draws the same numbers, and images agree to rounding. What diffusers saves loads here, and the other way round,
also where there is no fastddpm.

Reproduced, because images of the same seed depend on it:
    - Noise is drawn, and added, wherever t > 0: with "trailing" spacing or steps_offset the final image has noise of
      its own (standard deviation 0.0762 with "fixed_large" at 50 steps). Not so with `seeds=`, which has no images to
      reproduce: there the last step adds none.
    - DDIM with eta > 0 draws in every step, also where its standard deviation is 0; with eta = 0 it draws nothing.
    - z is drawn with the output's shape and dtype in C order, whatever its memory format; a list of generators draws
      one sample each, and a list that is too short is an IndexError (ValueError in DDIMPipeline).
    - DDIM's step leads from t to t - T // n, which is not the next timestep of "linspace" and "trailing" lists;
      `fastddpm.ddim_table` follows the list.
    - Before the end of the chain alpha_bar is 1 (DDPM) or final_alpha_cumprod (DDIM).
    - The variance is at least 1e-20; unknown variance types mean "fixed_small"; "learned" takes the output as the
      variance itself; dynamic thresholding goes before clipping, and sample_max_value < 1 wins over its floor of 1.
    - At zero terminal SNR, epsilon prediction gives x_0 = +-inf, which clipping makes finite. Without clipping x_0 is
      (x_t - eps) * 2^100 here.
    - DDPM steps without set_timesteps, DDIM raises ValueError. A timestep that is not in DDPM's list is an IndexError;
      one that only the accelerator knows cannot be checked without waiting for it, and gives NaN.

Fixed, because nobody can depend on it:
    - "fixed_large_log" is NaN in diffusers; here it is "fixed_large", which it means.
    - add_noise and get_velocity in bfloat16 and float16 round alpha_bar to that type first, so that t < 10 (bfloat16)
      or t < 2 (float16) get no noise at all; here coefficients are float32.
    - Steps in half precision round after every operation; here once, at the end.
    - add_noise moves the scheduler's own alphas_cumprod to the samples' device; here it stays, so that a scheduler can
      train on one device and sample on another.
    - DDIM with eta = 1 can take the root of -6e-8 where alpha_bar is near 0, which is NaN; here that is 0, and so is
      0 / 0 in x_0.
    - bfloat16 pipelines cannot return "np" or "pil" in diffusers; here the loop's state and images are float32.
    - Negative timesteps count from the end of the schedule in diffusers; here they are an IndexError.

Different, and worth knowing:
    - A step whose timestep only the accelerator knows, or that is compiled with a tensor as timestep, draws z at t = 0
      too (and leaves it out). Iterating over `scheduler.timesteps` is not such a case, nor is an int.
    - Float64, and tensors that need gradients, run diffusers' own step, which reads from the device as ever.
    - `pred_original_sample` is a new tensor in the dtype of `prev_sample`, also where diffusers returns the output.
    - A compiled step does not see what is written into a scheduler's tensors (alphas_cumprod, ...); an eager one does.
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
