"""Video: five frames at a time, each window conditioned on the last frame of the one before (Ho et al. 2022)."""

import torch

import fastddpm

FRAMES, SIZE = 5, 16


class VideoNet(torch.nn.Module):
    """eps_theta(x, t, first) for x [B, C, FRAMES, H, W]: convolutions over space and time, the first frame beside x."""

    def __init__(self, channels: int = 1, width: int = 16) -> None:
        super().__init__()
        self.time = torch.nn.Embedding(100, width)
        self.conv_in = torch.nn.Conv3d(2 * channels, width, 3, padding=1)
        self.conv_out = torch.nn.Conv3d(width, channels, 3, padding=1)
        torch.nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: torch.Tensor, t: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        beside = first[:, :, None].expand_as(x).to(x.dtype)
        h = self.conv_in(torch.cat([x, beside], dim=1)) + self.time(t)[:, :, None, None, None]
        return self.conv_out(torch.nn.functional.silu(h))


torch.manual_seed(0)
model, schedule = VideoNet(), fastddpm.Schedule.cosine(100)
# A square that moves one pixel a frame, from left or from right.
ramp = torch.arange(SIZE)
video = torch.stack([torch.where((ramp - f - 3).abs() < 3, 1.0, -1.0).expand(SIZE, SIZE) for f in range(FRAMES)])[None]
videos = torch.stack([video, video.flip(-1)])  # [2, C, FRAMES, H, W]

optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for step in range(60):
    loss = fastddpm.ddpm_loss(model, videos, schedule, seed=0, step=step, first=videos[:, :, 0])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in (0, 59):
        print(f"loss at step {step}: {loss.item():.3f}")

table = fastddpm.ddim_table(schedule, steps=10)
sampler = fastddpm.Sampler(model.eval(), table, (1, FRAMES, SIZE, SIZE), compile=False)
first, windows = videos[:, :, 0], []
for window in range(3):
    # No frame is known where the null is: guidance by the first frame.
    x = sampler.sample(
        seeds=[window, 100 + window], model_kwargs={"first": first}, null_kwargs={"first": 0.0}, guidance=1.5
    )
    windows.append(x)
    first = x[:, :, -1]
print("video:", tuple(torch.cat(windows, dim=2).shape))
