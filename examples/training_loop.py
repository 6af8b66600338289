"""Your own training loop: Algorithm 1 is one call. Points in the plane, so that it ends in seconds."""

import torch

import fastddpm
from fastddpm.data import points


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(3, 128),
            torch.nn.SiLU(),
            torch.nn.Linear(128, 128),
            torch.nn.SiLU(),
            torch.nn.Linear(128, 2),
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([x, t[:, None] / 50 - 1], dim=1))


schedule = fastddpm.Schedule.cosine(100)
data = points.draw("two-moons", 8192, seed=0)
net = Net()
optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
for n in range(600):
    x_0 = data[torch.randint(len(data), (512,))]
    # t and eps are functions of (seed, step, place in the batch): a resumed run sees what an uninterrupted one sees.
    loss = fastddpm.ddpm_loss(net, x_0, schedule, seed=0, step=n)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if n % 200 == 199:
        print(f"step {n + 1}: loss {loss.item():.3f}")

# Points are not held to [-1, 1]: the estimate of x_0 is clipped to where the data lie.
table = fastddpm.ddpm_table(schedule, clip_range=float(data.abs().max()))
sampler = fastddpm.Sampler(net.eval(), table, shape=(2,), compile=False)
samples = sampler.sample(seed=1, batch_size=2048)
real = points.draw("two-moons", 2048, seed=1)
for name, drawn in (("samples", samples), ("noise", fastddpm.randn((2048, 2), seed=2))):
    print(f"sliced Wasserstein distance of {name} to the data: {points.sliced_wasserstein(drawn, real):.3f}")
