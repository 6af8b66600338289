"""Swap fastddpm into a diffusers pipeline: the same images, from the same generator."""

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import fastddpm

unet = UNet2DModel(
    sample_size=16,
    in_channels=3,
    out_channels=3,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
).eval()
pipe = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=1000))
pipe.set_progress_bar_config(disable=True)

fast = fastddpm.accelerate(pipe)  # the one line


def draw(pipeline: DDPMPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = pipeline(batch_size=2, generator=generator, num_inference_steps=10, output_type="np").images
    return torch.as_tensor(images)


before, after = draw(pipe), draw(fast)
print("largest difference of pixels in [0, 1]:", float((before - after).abs().max()))
assert torch.allclose(before, after, atol=1e-4)
