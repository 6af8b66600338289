"""Swap fastddpm into denoising-diffusion-pytorch: the same images from the same global seed."""

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet

import fastddpm

diffusion = GaussianDiffusion(Unet(dim=16, dim_mults=(1, 2)), image_size=16, timesteps=50, auto_normalize=True).eval()
fast = fastddpm.accelerate(diffusion)  # the one line; after a Trainer: accelerate(trainer.ema.ema_model)

torch.manual_seed(0)
before = diffusion.sample(batch_size=2)
torch.manual_seed(0)
after = fast.sample(batch_size=2)
print("largest difference:", float((before - after).abs().max()))
assert torch.allclose(before, after, atol=1e-4)

# Beyond the original: one seed per image, whatever else is in the batch.
together, alone = fast.sample(seeds=[3, 4]), fast.sample(seeds=[4])
assert torch.allclose(together[1:], alone, atol=1e-4)
