"""A diffusion policy: draw a sequence of actions given what the robot observes (Chi et al. 2023)."""

import torch

import fastddpm

HORIZON, ACTIONS, OBSERVATIONS = 16, 7, 20


class NoisePredictor(torch.nn.Module):
    """eps_theta(actions_t, t, global_cond) for x [B, HORIZON, ACTIONS]."""

    def __init__(self) -> None:
        super().__init__()
        self.time = torch.nn.Embedding(100, 64)
        self.cond = torch.nn.Linear(OBSERVATIONS, 64)
        self.inner = torch.nn.Sequential(
            torch.nn.Linear(HORIZON * ACTIONS + 64, 128), torch.nn.Mish(), torch.nn.Linear(128, HORIZON * ACTIONS)
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, global_cond: torch.Tensor) -> torch.Tensor:
        context = self.time(t) + self.cond(global_cond)
        return self.inner(torch.cat([x.flatten(1), context], dim=1)).view_as(x)


schedule = fastddpm.Schedule.cosine(100)
policy = fastddpm.Sampler(
    NoisePredictor().eval(),
    fastddpm.ddim_table(schedule, steps=8),
    shape=(HORIZON, ACTIONS),
    compile=False,
)
# A control loop: the observation changes, the sampler and its buffers stay.
for tick in range(5):
    observation = torch.randn(1, OBSERVATIONS, generator=torch.Generator().manual_seed(tick))
    actions = policy.sample(seeds=[tick], model_kwargs={"global_cond": observation})
    print(tick, actions.shape, [round(a, 2) for a in actions[0, 0, :3].tolist()])
