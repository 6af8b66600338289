"""Sample a network of your own: anything called as model(x, t) will do."""

import torch

import fastddpm


class Net(torch.nn.Module):
    """eps_theta(x_t, t): a stand-in for the network that you trained."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


# What the network was trained for: its forward process, and what it predicts.
diffusion = fastddpm.DiffusionConfig(beta_schedule="linear", num_timesteps=1000, prediction_type="epsilon")
images = fastddpm.sample(Net().eval(), diffusion=diffusion, shape=(3, 32, 32), seeds=[7, 8], steps=10)
print(images.shape, float(images.min()), float(images.max()))

# The same network step by step, with any table.
table = fastddpm.ddpm_table(diffusion.schedule(), steps=10)
sampler = fastddpm.Sampler(Net().eval(), table, shape=(3, 32, 32))
for step in sampler.steps(seeds=[7, 8]):
    print(f"t = {step.t:4}: x_t has standard deviation {float(step.x_t.std()):.3f}")
