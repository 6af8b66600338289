"""Spacings against diffusers for sampled (T, steps), and improved-diffusion's rule against known facts."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastddpm.schedules.spacing import (
    INTEGER_SPACINGS,
    resolve_timesteps,
    space_timesteps,
    spaced_timesteps,
    validate_timesteps,
)

pytestmark = pytest.mark.filterwarnings("ignore:one step with")


@st.composite
def lengths(draw):
    T = draw(st.integers(1, 4000))
    return T, draw(st.integers(1, T))


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@settings(deadline=None, max_examples=150)
@given(lengths())
def test_spaced_timesteps_matches_diffusers(spacing, pair):
    schedulers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
    T, steps = pair
    scheduler = schedulers.DDPMScheduler(num_train_timesteps=T, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    theirs = scheduler.timesteps.tolist()
    # With trailing spacing np.arange overshoots for some pairs, and diffusers then visits a timestep -1 as well.
    assert theirs[steps:] in ([], [-1])
    assert spaced_timesteps(T, steps, spacing).tolist() == theirs[:steps]


@pytest.mark.parametrize(
    ("spacing", "known"),
    [
        ("linspace", [999, 832, 666, 500, 333, 166, 0]),
        ("leading", [852, 710, 568, 426, 284, 142, 0]),
        ("trailing", [999, 856, 713, 570, 428, 285, 142]),
        ("quadratic", [799, 555, 355, 200, 89, 22, 0]),
    ],
)
def test_spaced_timesteps_gives_the_known_lists(spacing, known):
    timesteps = spaced_timesteps(1000, 7, spacing)
    assert timesteps.tolist() == known
    assert timesteps.dtype == torch.int64


def test_spaced_timesteps_adds_the_offset_to_leading():
    assert spaced_timesteps(1000, 5, "leading", steps_offset=1).tolist() == [801, 601, 401, 201, 1]


@pytest.mark.parametrize("spacing", INTEGER_SPACINGS)
def test_spaced_timesteps_at_full_length_visits_everything(spacing):
    assert spaced_timesteps(37, 37, spacing).tolist() == list(range(36, -1, -1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11, "linspace"), "steps must be an integer >= 1 and <= 10, got 11"),
        ((10, 0, "linspace"), "steps must be an integer >= 1 and <= 10, got 0"),
        ((10, -1, "leading"), "got -1"),
        ((10, 2.0, "leading"), "steps must be an integer >= 1 and <= 10, got 2.0"),
        ((10, True, "leading"), "steps must be an integer >= 1 and <= 10, got True"),
        ((0, 1, "leading"), "num_timesteps must be an integer"),
        ((10, 5, "karras"), "unknown spacing 'karras'; choose one of linspace, leading, trailing, quadratic"),
        ((10, 10, "leading", 1), r"timesteps must lie in 0..9, got timesteps\[0\] = 10"),
    ],
)
def test_spaced_timesteps_refuses_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        spaced_timesteps(*arguments)


@pytest.mark.filterwarnings("default:one step with")
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_spaced_timesteps_warns_when_the_only_step_is_t0(spacing):
    with pytest.warns(UserWarning, match=r'visits only t = 0.*use spacing="trailing"'):
        spaced_timesteps(1000, 1, spacing)


@pytest.mark.filterwarnings("error")
def test_spaced_timesteps_does_not_warn_for_one_trailing_step():
    assert spaced_timesteps(1000, 1, "trailing").tolist() == [999]


def test_space_timesteps_accumulates_the_position():
    # 278 counts below 1001 differ from rounding i * stride, counted on improved-diffusion's own function.
    differing = 0
    for count in range(2, 1001):
        stride = 999 / (count - 1)
        differing += space_timesteps(1000, [count]).tolist()[::-1] != [round(i * stride) for i in range(count)]
    assert differing == 278


def test_space_timesteps_divides_into_sections():
    # 300 timesteps in three sections of 100: both ends of each section are kept.
    kept = space_timesteps(300, [10, 15, 20]).tolist()[::-1]
    for section, count in enumerate((10, 15, 20)):
        inside = [t for t in kept if 100 * section <= t < 100 * (section + 1)]
        assert len(inside) == count
        assert (inside[0], inside[-1]) == (100 * section, 100 * section + 99)
        gaps = np.diff(inside)
        assert gaps.max() - gaps.min() <= 1
    assert space_timesteps(300, "10,15,20").tolist()[::-1] == kept


def test_space_timesteps_gives_the_remainder_to_the_first_sections():
    assert space_timesteps(11, [4, 4, 3]).tolist()[::-1] == list(range(11))


def test_space_timesteps_keeps_the_first_of_a_section_of_one():
    assert space_timesteps(10, [1, 1]).tolist() == [5, 0]


def test_space_timesteps_rounds_half_to_even():
    # Positions 0, 0.5 * 5, 5 with stride 2.5.
    assert space_timesteps(6, [3]).tolist()[::-1] == [0, 2, 5]


@pytest.mark.parametrize(("text", "stride"), [("ddim50", 20), ("ddim7", 143), ("ddim1000", 1), ("ddim1", 1000)])
def test_space_timesteps_ddim_uses_an_integer_stride(text, stride):
    assert space_timesteps(1000, text).tolist()[::-1] == list(range(0, 1000, stride))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("ddim600", "no integer stride over 1000 timesteps keeps exactly 600"),
        ("ddim", 'must look like "10,15,20" or "ddim50", got \'ddim\''),
        ("10,x", "got '10,x'"),
        ([600, 500], r"section_counts\[0\] must lie in 1..500, the length of that section; got 600"),
        ([0, 5], r"section_counts\[0\] must lie in"),
        ([], "at least one section"),
    ],
)
def test_space_timesteps_refuses_bad_counts(counts, message):
    with pytest.raises(ValueError, match=message):
        space_timesteps(1000, counts)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([], "at least one timestep"),
        ([1000, 5], r"timesteps must lie in 0..999, got timesteps[0] = 1000"),
        ([5, -1], "got timesteps[1] = -1"),
        ([5.0, 1], "timesteps must be integers, got timesteps[0] = 5.0"),
        (torch.tensor([5.0, 1.0]), "timesteps must be integers, got timesteps[0] = 5.0"),
        ([True], "timesteps must be integers, got timesteps[0] = True"),
        (["5"], "timesteps must be integers, got timesteps[0] = '5'"),
        ([7, 7, 1], "must descend strictly, got timesteps[1] = 7 after 7"),
        ([1, 7], "got timesteps[1] = 7 after 1; sort the list in descending order"),
    ],
)
def test_validate_timesteps_refuses_bad_lists(timesteps, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        validate_timesteps(timesteps, 1000)


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda v: torch.tensor(v, dtype=torch.int32)])
def test_validate_timesteps_accepts_any_integer_sequence(make):
    timesteps = validate_timesteps(make([900, 30, 0]), 1000)
    assert torch.equal(timesteps, torch.tensor([900, 30, 0]))


def test_resolve_timesteps_takes_steps_or_a_list_or_neither():
    assert torch.equal(resolve_timesteps(10), torch.arange(9, -1, -1))
    assert torch.equal(resolve_timesteps(10, steps=2), torch.tensor([9, 0]))
    assert torch.equal(resolve_timesteps(10, timesteps=[4, 1]), torch.tensor([4, 1]))
    with pytest.raises(ValueError, match="give steps or timesteps, not both; got steps = 2"):
        resolve_timesteps(10, steps=2, timesteps=[4, 1])


def test_resolve_timesteps_passes_the_spacing_on():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_timesteps(1000, steps=2, spacing="leading", steps_offset=3).tolist() == [503, 3]
