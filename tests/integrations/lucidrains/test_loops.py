"""Whole loops of the denoising-diffusion-pytorch drop-in, against the installed package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.integrations.lucidrains import GaussianDiffusion
from fastddpm.integrations.lucidrains.tables import OBJECTIVES, SCHEDULES, ddim_table
from tests.integrations.lucidrains.cases import SIZE, Net, both, images, options, pair, relative, seeded_sample

pytestmark = pytest.mark.filterwarnings("ignore:the schedule does not end near a Gaussian")


@pytest.mark.parametrize(("objective", "schedule"), list(zip(OBJECTIVES, SCHEDULES, strict=True)))
def test_sample_is_the_originals_over_1000_steps(original: Any, objective: str, schedule: str) -> None:
    theirs, ours = pair(original, timesteps=1000, objective=objective, beta_schedule=schedule)
    both(ours, theirs, "sample", batch_size=2, within=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 7])
def test_ddim_is_the_originals_with_the_same_draws(
    original: Any, schedule: str, objective: str, eta: float, steps: int
) -> None:
    theirs, ours = pair(
        original, objective=objective, beta_schedule=schedule, sampling_timesteps=steps, ddim_sampling_eta=eta
    )
    both(ours, theirs, "sample", batch_size=2, within=2e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_ddim_step_is_within_1e6_of_the_original(original: Any, schedule: str, objective: str) -> None:
    theirs, ours = pair(
        original,
        timesteps=1000,
        objective=objective,
        beta_schedule=schedule,
        sampling_timesteps=250,
        ddim_sampling_eta=0.5,
    )
    # The states of the original run, each advanced by one step of ours: row i of the table.
    states = seeded_sample(theirs, batch_size=2, return_all_timesteps=True)[0] * 2 - 1
    table = ours._cached("ddim", ddim_table, objective, 250, 0.5, True)
    torch.manual_seed(5)
    torch.randn(2, 3, SIZE, SIZE)
    for i, t in enumerate(table.timesteps.tolist()):
        z = torch.randn(2, 3, SIZE, SIZE) if i < 249 else torch.zeros(())
        if i % 20 and i < 240:
            continue
        step = ours_step(ours, table, i, states[:, i], t, z)
        assert relative(step, states[:, i + 1]) <= 1e-6, t


def ours_step(diffusion: GaussianDiffusion, table: Any, i: int, x: Tensor, t: int, z: Tensor) -> Tensor:
    with torch.no_grad():
        output = diffusion.model(x, torch.full((len(x),), t))
        return ops.p_sample(x, output, table.rows, torch.tensor([i]), z.expand_as(x).contiguous(), clip=True)


@pytest.mark.parametrize("steps", [None, 6])
def test_return_all_timesteps_is_the_originals(original: Any, steps: int | None) -> None:
    theirs, ours = pair(original, timesteps=21, sampling_timesteps=steps)
    states = both(ours, theirs, "sample", batch_size=2, return_all_timesteps=True)
    assert states.shape == (2, (steps or 21) + 1, 3, SIZE, SIZE)


def test_sample_with_active_dropout_draws_as_the_original(original: Any) -> None:
    net = Net(dropout=0.5).train()
    arguments = options(timesteps=21)
    theirs, ours = original.GaussianDiffusion(net, **arguments), GaussianDiffusion(net, **arguments)
    both(ours, theirs, "sample", batch_size=2, within=0.0)


def test_sample_of_the_originals_unet_and_checkpoint(original: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    theirs = original.GaussianDiffusion(original.Unet(dim=8, dim_mults=(1, 2)), **options(timesteps=20)).eval()
    torch.save({"step": 1, "model": theirs.state_dict()}, tmp_path / "model-1.pt")
    ours = GaussianDiffusion(original.Unet(dim=8, dim_mults=(1, 2)), **options(timesteps=20, beta_schedule="cosine"))
    ours.load_state_dict(torch.load(tmp_path / "model-1.pt", weights_only=True)["model"])
    expected, _ = seeded_sample(theirs, batch_size=2)
    assert float((seeded_sample(ours.eval(), batch_size=2)[0] - expected).abs().max()) <= 1e-5
    again = original.GaussianDiffusion(original.Unet(dim=8, dim_mults=(1, 2)), **options(timesteps=20))
    again.load_state_dict(ours.state_dict())
    assert torch.equal(seeded_sample(again.eval(), batch_size=2)[0], expected)


@pytest.mark.parametrize("t", [None, 12, 1, 0])
def test_interpolate_is_the_originals_with_the_same_draws(original: Any, t: int | None) -> None:
    theirs, ours = pair(original, timesteps=21)
    both(ours, theirs, "interpolate", images(1) * 2 - 1, images(2) * 2 - 1, t=t, lam=0.3)
