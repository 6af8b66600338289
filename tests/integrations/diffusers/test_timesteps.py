"""Which timesteps the schedulers of DDPM and DDIM list and take, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from fastddpm.integrations.diffusers import FastDDIMScheduler, FastDDPMScheduler
from tests.integrations.diffusers.cases import (
    BOTH,
    PAIRS,
    x_and_m,
)


@pytest.mark.parametrize("steps", [0, -1])
@BOTH
def test_set_timesteps_refuses_no_steps(fast: Any, original: Any, steps: int) -> None:
    with pytest.raises(ValueError, match=f"integer >= 1, got {steps}"):
        fast().set_timesteps(steps)


@pytest.mark.parametrize(
    "timestep", [500, np.int64(500), torch.tensor(500), torch.tensor([500]), torch.tensor(500, dtype=torch.int32)]
)
@BOTH
def test_step_takes_any_integer_as_timestep(fast: Any, original: Any, timestep: Any) -> None:
    scheduler = fast()
    scheduler.set_timesteps(20)
    x, m = x_and_m()
    expected = scheduler.step(m, 500, x, generator=torch.Generator().manual_seed(1)).prev_sample
    actual = scheduler.step(m, timestep, x, generator=torch.Generator().manual_seed(1)).prev_sample
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("timestep", "error"),
    [
        (1000, IndexError),
        (501, IndexError),
        (500.0, IndexError),
        (torch.tensor(500.0), IndexError),
        (torch.tensor([500, 0]), RuntimeError),
        ("500", IndexError),
    ],
)
def test_ddpm_step_refuses_a_timestep_with_diffusers_exception(timestep: Any, error: type[Exception]) -> None:
    x, m = x_and_m()
    ours, theirs = FastDDPMScheduler(), DDPMScheduler()
    ours.set_timesteps(20)
    theirs.set_timesteps(20)
    with pytest.raises(error, match="timestep"):
        ours.step(m, timestep, x)
    if not isinstance(timestep, str):
        with pytest.raises(error):
            theirs.step(m, timestep, x)


@pytest.mark.parametrize(
    ("config", "call", "error"),
    [
        ({}, lambda s: s.set_timesteps(1001), ValueError),
        ({}, lambda s: s.set_timesteps(10, timesteps=[3, 2]), ValueError),
        ({}, lambda s: s.set_timesteps(timesteps=[3, 3]), ValueError),
        ({}, lambda s: s.set_timesteps(timesteps=[1000, 3]), ValueError),
        ({"timestep_spacing": "other"}, lambda s: s.set_timesteps(10), ValueError),
        ({"prediction_type": "other"}, lambda s: s.step(*x_and_m()[::-1][:1], 500, x_and_m()[0]), ValueError),
        ({"variance_type": "learned"}, lambda s: s.step(x_and_m()[1], 500, x_and_m()[0]), TypeError),
        ({"variance_type": "learned_range"}, lambda s: s.step(x_and_m()[1], 500, x_and_m()[0]), TypeError),
    ],
)
def test_ddpm_refuses_bad_input_with_diffusers_exception(config: Any, call: Any, error: type[Exception]) -> None:
    for scheduler in (FastDDPMScheduler(**config), DDPMScheduler(**config)):
        with pytest.raises(error):
            call(scheduler)


def test_unknown_beta_schedule_is_refused_as_in_diffusers() -> None:
    for scheduler_class in (FastDDPMScheduler, DDPMScheduler, FastDDIMScheduler, DDIMScheduler):
        with pytest.raises(NotImplementedError):
            scheduler_class(beta_schedule="other")


def test_step_refuses_shapes_that_do_not_fit() -> None:
    x, _ = x_and_m()
    scheduler = FastDDPMScheduler()
    with pytest.raises(ValueError, match="6"):
        scheduler.step(torch.zeros(2, 6, 4, 4), 500, x)


def test_ddim_step_needs_set_timesteps_and_ddpm_step_does_not() -> None:
    x, m = x_and_m()
    for scheduler in (FastDDIMScheduler(), DDIMScheduler()):
        with pytest.raises(ValueError, match="set_timesteps"):
            scheduler.step(m, 500, x)
    for scheduler in (FastDDPMScheduler(), DDPMScheduler()):
        assert scheduler.step(m, 0, x, return_dict=False)[0].shape == x.shape


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(1, 1200),
    share=st.floats(0, 1),
    spacing=st.sampled_from(["linspace", "leading", "trailing"]),
    offset=st.integers(0, 2),
)
def test_set_timesteps_lists_what_diffusers_lists(T: int, share: float, spacing: str, offset: int) -> None:
    steps = max(1, round(share * T))
    config = {"num_train_timesteps": T, "timestep_spacing": spacing, "steps_offset": offset}
    for fast, original in PAIRS:
        ours, theirs = fast(**config), original(**config)
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert ours.num_inference_steps == theirs.num_inference_steps
        # "trailing" overshoots to -1 for some (T, n), as the original does; no step takes that.
        if int(theirs.timesteps[0]) < T and int(theirs.timesteps[-1]) >= 0:
            table = ours.as_table()
            assert torch.equal(table.timesteps, theirs.timesteps)
            assert bool(table.rows64.isfinite()[:, [0, 1, 4, 5, 6, 7, 8, 9, 10, 11]].all())
