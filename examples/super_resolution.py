"""Super-resolution: the network sees the small picture beside x_t, as further channels (Saharia et al. 2021)."""

import torch

import fastddpm

# Three channels of x_t, and three of the enlarged small picture; what the network returns has three.
config = fastddpm.UNetConfig(
    sample_size=32,
    in_channels=6,
    out_channels=3,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
)
torch.manual_seed(0)
model = fastddpm.UNet(config).eval()
small = torch.rand(2, 3, 8, 8) * 2 - 1
low = torch.nn.functional.interpolate(small, size=32, mode="bicubic")

diffusion = fastddpm.DiffusionConfig(beta_schedule="cosine")
large = fastddpm.sample(model, seeds=[0, 1], steps=10, diffusion=diffusion, model_kwargs={"condition": low})
print(small.shape, "->", large.shape)

# Training is the usual loss with the same keyword; `fastddpm train` takes an .npz file of images and condition.
loss = fastddpm.ddpm_loss(model, large, diffusion.schedule(), seed=0, step=0, condition=low)
print("loss of the untrained network:", loss.item())
