"""Super-resolution: the network sees the small picture beside x_t, as further channels (Saharia et al. 2021)."""

import torch

import fastddpm


class Conditioned(torch.nn.Module):
    """A UNet of six channels in and three out: x_t, and the enlarged small picture."""

    def __init__(self, unet: fastddpm.UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: torch.Tensor, t: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        return self.unet(torch.cat([x, low], dim=1), t)


config = fastddpm.UNetConfig(
    in_channels=6,
    out_channels=3,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
)
torch.manual_seed(0)
model = Conditioned(fastddpm.UNet(config)).eval()
small = torch.rand(2, 3, 8, 8) * 2 - 1
low = torch.nn.functional.interpolate(small, size=32, mode="bicubic")

table = fastddpm.ddim_table(fastddpm.Schedule.cosine(1000), steps=10)
sampler = fastddpm.Sampler(model, table, shape=(3, 32, 32), compile=False)
large = sampler.sample(seeds=[0, 1], model_kwargs={"low": low})
print(small.shape, "->", large.shape)

# Training is the usual loss, with the same keyword:
loss = fastddpm.ddpm_loss(model, large, fastddpm.Schedule.cosine(1000), seed=0, step=0, low=low)
print("loss of the untrained network:", loss.item())
