"""Your own training loop, and samples: torchrun --nproc-per-node 2 examples/several_processes.py"""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastddpm
from fastddpm.data import points

if "RANK" in os.environ:
    dist.init_process_group()
else:
    # Without torchrun: one process.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 128), torch.nn.SiLU(), torch.nn.Linear(128, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([x, t[:, None] / 50 - 1], dim=1))


schedule = fastddpm.Schedule.cosine(100)
data = points.draw("two-moons", 8192, seed=0).to(device)
torch.manual_seed(0)
net = DistributedDataParallel(Net().to(device))
optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
B = 512
for n in range(150):
    # The same points in every process, of which each takes a share.
    k = torch.randint(len(data), (B,), generator=torch.Generator().manual_seed(n)).tensor_split(world)[rank]
    # t and eps of point k at step n, whichever process draws them.
    losses = fastddpm.ddpm_loss(net, data[k], schedule, seed=0, step=n, sample_ids=k, reduction="none")
    # DistributedDataParallel takes the mean of the processes' gradients: that of all points, however they are divided.
    loss = losses.sum() * (world / B)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if n % 50 == 49:
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {n + 1}: loss {loss.item() / world:.3f}")

samples = fastddpm.sample(
    net.module.eval(),
    (2,),
    seeds=range(1024),
    diffusion=fastddpm.DiffusionConfig(beta_schedule="cosine", num_timesteps=100, clip_range=3.0),
    process_group=dist.group.WORLD,
    compile=False,
)
if rank == 0:
    distance = points.sliced_wasserstein(samples.cpu(), points.draw("two-moons", 1024, seed=1))
    print(f"sliced Wasserstein distance of {len(samples)} samples to the data: {distance:.3f}")
dist.destroy_process_group()
