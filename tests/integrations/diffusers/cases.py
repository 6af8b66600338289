"""Cases and comparisons shared by the differential tests against diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from torch import Tensor

from fastddpm.integrations.diffusers import FastDDIMScheduler, FastDDPMScheduler
from tests import tiny

# Of the largest value: one float32 step through the rows of a table, against diffusers' operations one by one.
STEP_RTOL = 1e-6
SHAPE = (2, 3, 4, 4)
# Images in [0, 1] of whole loops, of the same seed.
LOOP_ATOL = 1e-4
PAIRS = [(FastDDPMScheduler, DDPMScheduler), (FastDDIMScheduler, DDIMScheduler)]
BOTH = pytest.mark.parametrize(("fast", "original"), PAIRS, ids=["ddpm", "ddim"])
DDPM_VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "trailing-large": ({"timestep_spacing": "trailing", "variance_type": "fixed_large"}, {}),
    "offset": ({"steps_offset": 1}, {}),
    "learned_range": ({"variance_type": "learned_range"}, {"out_channels": 2}),
    "v-snr": ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {}),
    "epsilon-snr": ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}),
    "sample-free": ({"prediction_type": "sample", "clip_sample": False}, {}),
    "dynamic": ({"thresholding": True}, {}),
}


def assert_step_matches(ours: Any, theirs: Any, *, a: float, scale: float) -> None:
    """Compare a step's two results: prev_sample within 1e-6 of its largest value, x_0 within 4 ulp times |a|.

    Args:
        a: the coefficient of x_t in x_0; x_0 is ill-conditioned where it is large.
        scale: the largest of x_t's and the output's values.
    """
    bound = STEP_RTOL * float(theirs.prev_sample.abs().max())
    torch.testing.assert_close(ours.prev_sample, theirs.prev_sample, rtol=0, atol=bound)
    ulp = torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        ours.pred_original_sample, theirs.pred_original_sample, rtol=0, atol=4 * ulp * max(1.0, abs(a)) * scale
    )


def tiny_unet(**options: Any) -> UNet2DModel:
    """Build a UNet2DModel of 8x8 images, about 20,000 parameters, the same each time."""
    config = {**tiny.ATTENTION, "attention_head_dim": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(**{**config, **options}).eval()


def tiny_dit_pipeline() -> DiTPipeline:
    """Build a class-conditional pipeline with guidance, a VAE and diffusers' DDIMScheduler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            sample_size=4,
            norm_num_groups=4,
            num_embeds_ada_norm=1000,
        ).eval()
        vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4).eval()
    return DiTPipeline(transformer, vae, DDIMScheduler())


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw a normal tensor from a generator of its own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def x_and_m(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = shape or SHAPE
    return normal(*shape, seed=1), normal(*shape, seed=2)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, steps: int = 8, batch: int = 2, seed: int = 5, **options: Any) -> Any:
    """Draw images; return them and what the generator would draw next."""
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(
        batch_size=batch, generator=generator, num_inference_steps=steps, output_type="np", **options
    ).images
    return images, generator.get_state()


def assert_same_images(ours: Any, theirs: Any, steps: int = 8, **options: Any) -> None:
    (actual, left), (expected, expected_left) = (generate(pipe, steps, **options) for pipe in (ours, theirs))
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=LOOP_ATOL)
    assert torch.equal(left, expected_left)
