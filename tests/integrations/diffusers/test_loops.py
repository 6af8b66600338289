"""Full runs of 1000 steps through a small UNet: the fast schedulers and pipeline against diffusers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import Tensor

from fastddpm.integrations import accelerate
from fastddpm.integrations.diffusers import FastDDIMScheduler, FastDDPMScheduler
from tests.integrations.diffusers.cases import tiny_unet

STEPS, ATOL = 1000, 1e-4
SMALL = {"block_out_channels": (4,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
DDPM_RUNS: list[dict[str, Any]] = [
    {},
    {"beta_schedule": "scaled_linear", "variance_type": "fixed_large", "clip_sample_range": 2.0},
    {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"},
    {"prediction_type": "sample", "clip_sample": False, "timestep_spacing": "trailing"},
    {"prediction_type": "v_prediction", "variance_type": "fixed_small_log", **ZERO_SNR},
    {"beta_schedule": "laplace", "prediction_type": "sample"},
    {"beta_schedule": "sigmoid"},
    {"thresholding": True, "sample_max_value": 1.5},
]
# Without noise, epsilon prediction by an untrained network is chaotic: diffusers' own run from an x_T that differs by
# 1e-7 ends elsewhere. tests/tables/test_ddim.py has such runs with a linear network.
DDIM_RUNS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"beta_schedule": "squaredcos_cap_v2", "set_alpha_to_one": False}, {"eta": 0.5}),
    ({"beta_schedule": "scaled_linear"}, {"eta": 0.9, "use_clipped_model_output": True}),
    ({"prediction_type": "v_prediction", **ZERO_SNR}, {}),
]
N = len(DDPM_RUNS) + len(DDIM_RUNS)
LEARNED_RANGE = 2


def runs() -> list[tuple[Any, dict[str, Any], torch.Generator]]:
    """Return scheduler, options of its step and generator: ours, then diffusers' in the same order."""
    found = []
    for ddpm, ddim in ((FastDDPMScheduler, FastDDIMScheduler), (DDPMScheduler, DDIMScheduler)):
        cases = [(ddpm(**config), {}) for config in DDPM_RUNS]
        cases += [(ddim(**config), options) for config, options in DDIM_RUNS]
        found += [(scheduler, options, torch.Generator().manual_seed(5)) for scheduler, options in cases]
    for scheduler, _, _ in found:
        scheduler.set_timesteps(STEPS)
    return found


@pytest.fixture(scope="module")
def unet() -> Any:
    """A UNet whose output depends little on x: an untrained one at full strength makes runs chaotic."""
    unet = tiny_unet(**SMALL, add_attention=False, out_channels=2, sample_size=4)
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.25)
    return unet


@pytest.fixture(scope="module")
def finished(unet: Any) -> tuple[list[Any], Tensor]:
    """Return the runs' members and final states [2 N, 1, 4, 4]."""
    members = runs()
    xs = [torch.randn(1, 1, 4, 4, generator=generator) for _, _, generator in members]
    for t in range(STEPS - 1, -1, -1):
        # All of them visit 999..0, so that they can share the UNet's batch.
        with torch.no_grad():
            outputs = unet(torch.cat(xs), t).sample.split(1)
        for i, (scheduler, options, generator) in enumerate(members):
            m = outputs[i] if scheduler.config.get("variance_type") == "learned_range" else outputs[i][:, :1]
            xs[i] = scheduler.step(m, t, xs[i], generator=generator, **options).prev_sample
    return members, torch.cat(xs)


def test_runs_of_1000_steps_stay_within_1e_4(finished: tuple[list[Any], Tensor]) -> None:
    members, x = finished
    ours, theirs = x.chunk(2)
    assert len(ours) == N
    assert bool(theirs.isfinite().all())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ATOL)
    for (_, _, a), (_, _, b) in zip(members[:N], members[N:], strict=True):
        assert torch.equal(a.get_state(), b.get_state())


def test_the_whole_loop_of_1000_steps_stays_within_1e_4(unet: Any, finished: tuple[list[Any], Tensor]) -> None:
    pipe = accelerate(DDPMPipeline(unet, DDPMScheduler(**DDPM_RUNS[LEARNED_RANGE])))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(generator=torch.Generator().manual_seed(5), output_type="pt").images
    theirs = finished[1][N + LEARNED_RANGE]
    torch.testing.assert_close(images[0], (theirs / 2 + 0.5).clamp(0, 1), rtol=0, atol=ATOL)
