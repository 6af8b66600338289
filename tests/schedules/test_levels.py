"""Noise levels: spacings against diffusers and their definitions, levels between timesteps, and what is refused."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastddpm.schedules.levels import AYS, SPACINGS, alpha_bar_at, noise_levels, timesteps_at
from fastddpm.schedules.schedule import Schedule

SCHEDULE = Schedule.linear()
STABLE_DIFFUSION = Schedule.scaled_linear(1000, 0.00085, 0.012)

pytestmark = pytest.mark.filterwarnings("ignore:one step with")


@st.composite
def lengths(draw):
    T = draw(st.integers(2, 2000))
    return T, draw(st.integers(1, T - 1))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:the schedule does not end near")
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@settings(deadline=None, max_examples=60)
@given(lengths())
def test_noise_levels_visit_the_timesteps_of_diffusers_solvers(spacing, pair):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
    T, steps = pair
    scheduler = diffusers.DPMSolverMultistepScheduler(num_train_timesteps=T, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    theirs = scheduler.timesteps.tolist()
    # With trailing spacing np.arange overshoots for some pairs, and diffusers then visits a timestep -1 as well.
    assert theirs[steps:] in ([], [-1])
    assert noise_levels(Schedule.linear(T), steps=steps, spacing=spacing).timesteps.tolist() == theirs[:steps]


def sigmas(levels) -> np.ndarray:
    return ((1 - levels.alphas_cumprod) / levels.alphas_cumprod).sqrt().numpy()


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_karras_and_logsnr_are_their_definitions(final):
    n, points = 9, 9 + (final == "sigma_min")
    both = sigmas(noise_levels(SCHEDULE, timesteps=[999], final="sigma_min"))
    ramp = np.linspace(0, 1, points)
    rho = 7.0
    expected = {
        "karras": (both[0] ** (1 / rho) + ramp * (both[1] ** (1 / rho) - both[0] ** (1 / rho))) ** rho,
        "logsnr": np.exp(np.log(both[0]) + ramp * (np.log(both[1]) - np.log(both[0]))),
    }
    for spacing, levels in expected.items():
        ours = noise_levels(SCHEDULE, steps=n, spacing=spacing, final=final)
        np.testing.assert_allclose(sigmas(ours)[:points], levels, rtol=1e-9)
        assert sigmas(ours)[-1] == (0.0 if final == "zero" else pytest.approx(both[1]))
        assert ours.timesteps.dtype == torch.float32


@pytest.mark.parametrize(("spacing", "name"), [("ays-sd15", "StableDiffusion"), ("ays-sdxl", "StableDiffusionXL")])
def test_ays_with_ten_steps_is_the_published_list(spacing, name):
    schedules = pytest.importorskip("diffusers.schedulers.scheduling_utils", reason="diffusers has the lists")
    levels = noise_levels(STABLE_DIFFUSION, steps=10, spacing=spacing)
    assert levels.timesteps.tolist() == schedules.AysSchedules[f"{name}Timesteps"]
    # Their lists of sigma have three decimals, and belong to the timesteps before they were rounded.
    np.testing.assert_allclose(sigmas(levels), schedules.AysSchedules[f"{name}Sigmas"], rtol=0.02)
    between = noise_levels(STABLE_DIFFUSION, steps=20, spacing=spacing)
    assert between.timesteps[::2].tolist() == pytest.approx(AYS[spacing][:-1], abs=1e-3)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [1, 2, 7, 300])
def test_levels_rise_to_their_end(spacing, final, steps):
    levels = noise_levels(SCHEDULE, steps=steps, spacing=spacing, final=final)
    assert len(levels.timesteps) == steps
    assert (levels.alphas_cumprod.diff() > 0).all()
    assert (levels.timesteps.diff() < 0).all()
    assert float(levels.alphas_cumprod[-1]) == (1.0 if final == "zero" else float(SCHEDULE.alphas_cumprod[0]))


@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule.cosine(50), SCHEDULE.zero_terminal_snr()])
def test_timesteps_at_inverts_alpha_bar_at(schedule):
    T = schedule.num_timesteps
    timesteps = torch.linspace(0, T - 2, 4 * T, dtype=torch.float64)
    alpha_bar = alpha_bar_at(schedule, timesteps)
    found = timesteps_at(schedule, ((1 - alpha_bar) / alpha_bar).sqrt())
    torch.testing.assert_close(found, timesteps, rtol=0, atol=1e-7)
    whole = torch.arange(T, dtype=torch.float64)
    assert torch.equal(alpha_bar_at(schedule, whole), schedule.alphas_cumprod)


def test_lists_of_timesteps_and_sigmas_are_taken_as_they_are():
    levels = noise_levels(SCHEDULE, timesteps=[900.5, 30, 0])
    assert levels.timesteps.tolist() == [900.5, 30.0, 0.0]
    assert noise_levels(SCHEDULE, timesteps=torch.tensor([900, 30])).timesteps.dtype == torch.int64
    pasted = noise_levels(STABLE_DIFFUSION, sigmas=[14.6, 2.0, 0.3, 0.0])
    assert pasted.alphas_cumprod.tolist() == pytest.approx([1 / (1 + s**2) for s in (14.6, 2.0, 0.3, 0.0)])
    at = noise_levels(STABLE_DIFFUSION, timesteps=pasted.timesteps)
    torch.testing.assert_close(at.alphas_cumprod[:-1], pasted.alphas_cumprod[:-1], rtol=1e-5, atol=0)
    both = noise_levels(SCHEDULE, sigmas=[5.0, 1.0, 0.5], timesteps=[700, 300])
    assert both.timesteps.tolist() == [700, 300]
    assert float(both.alphas_cumprod[-1]) == 0.8


REFUSED = {
    "unknown spacing": ({"steps": 5, "spacing": "karas"}, "unknown spacing 'karas' (did you mean 'karras'?)"),
    "unknown final": ({"steps": 5, "final": "none"}, "unknown final 'none'; choose one of zero, sigma_min"),
    "no steps": ({"steps": 0}, "steps must be an integer >= 1 and <= 1000, got 0"),
    "negative steps": ({"steps": -1}, "steps must be an integer >= 1 and <= 1000, got -1"),
    "two of them": ({"steps": 5, "timesteps": [5, 4]}, "give steps or a list of timesteps or sigmas, not both"),
    "rising": ({"timesteps": [4, 5]}, "timesteps must descend, got timesteps[1] = 5.0 after 4.0"),
    "nan": ({"timesteps": [math.nan]}, "timesteps[0] must be a finite number >= 0.0 and <= 999.0, got nan"),
    "nested": ({"timesteps": [[5], [4]]}, "timesteps[0] must be a finite number"),
    "beyond T": ({"timesteps": [1000]}, "<= 999.0, got 1000"),
    "empty": ({"timesteps": []}, "timesteps must be a list of numbers, got []"),
    "text": ({"timesteps": "10"}, "timesteps must be a list of numbers, got '10'"),
    "number": ({"timesteps": 10}, "timesteps must be a list of numbers, got 10"),
    "one sigma": ({"sigmas": [3.0]}, "sigmas must hold one level more than there are steps, got 1 of them"),
    "sigmas and timesteps": ({"sigmas": [3.0, 0.0], "timesteps": [9, 8]}, "sigmas needs 3 levels for 2 timesteps"),
    "too much noise": (
        {"sigmas": [700.0, 1.0, 0.0]},
        "sigmas of steps must lie in [0.0100005, 157.407], the schedule's",
    ),
    "rising sigmas": ({"sigmas": [3.0, 4.0]}, "sigmas must descend, got sigmas[1] = 4.0 after 3.0"),
    "end at the end": ({"timesteps": [5, 0], "final": "sigma_min"}, "the last timestep is 0 and final='sigma_min'"),
    "all the way": ({"final": "sigma_min"}, "the last timestep is 0 and final='sigma_min'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_noise_levels_refuses(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        noise_levels(SCHEDULE, **options)


def test_spacings_that_look_at_the_noise_refuse_what_they_cannot_space():
    with pytest.raises(ValueError, match="'karras' needs signal at every level, and alpha_bar is 0 at T; use trailing"):
        noise_levels(SCHEDULE.zero_terminal_snr(), steps=5, spacing="karras")
    with pytest.raises(ValueError, match="lists timesteps of T = 1000, and this schedule has T = 500; use logsnr"):
        noise_levels(Schedule.cosine(500), steps=5, spacing="ays-sd15")
