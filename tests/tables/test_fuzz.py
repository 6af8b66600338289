"""Arguments at random, sensible and not: finite rows, or ValueError or TypeError with a name and a value."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastddpm.noise.seeds import resolve_seeds
from fastddpm.schedules.betas import SCHEDULES
from fastddpm.schedules.diffusion import PREDICTION_TYPES, VARIANCE_TYPES, DiffusionConfig
from fastddpm.schedules.levels import FINALS
from fastddpm.schedules.levels import SPACINGS as LEVEL_SPACINGS
from fastddpm.schedules.schedule import Schedule
from fastddpm.schedules.spacing import space_timesteps, spaced_timesteps
from fastddpm.tables.by_name import SAMPLERS, make_table
from fastddpm.tables.ddim import ddim_inversion_table
from fastddpm.tables.table import loss_rows, q_rows, q_step_rows

# What a user, a file or a slip may give where something else belongs.
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([10**400, 2**63, -(2**64), 1e-320, 1e308, math.inf, -math.inf, math.nan, 0.5, 1 + 2**-52]),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.one_of(st.integers(-2, 20), st.floats(), st.lists(st.integers(0, 3), max_size=2)), max_size=4),
    st.sampled_from([torch.tensor(3), torch.tensor([[3, 2]]), torch.tensor([3.5, 2.0]), torch.zeros(0), object()]),
)
# Betas at the ends of what a float64 can tell from 0 and 1.
BETA = st.one_of(
    st.floats(0.0, 1.0),
    st.sampled_from([1e-320, 1e-300, 1e-17, 2**-53, 1e-12, 1e-4, 0.02, 0.5, 0.999, 1 - 2**-53, 1.0]),
)


def holds(make: Callable[[], Any], *tensors: Callable[[Any], torch.Tensor]) -> None:
    """Make something, and check that the tensors read off it are finite; or see it refused in words that say why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = refusal = None
        try:
            made = make()
        except (ValueError, TypeError) as error:
            refusal = str(error)
    if refusal is not None:
        assert len(refusal) > 15, refusal
        return
    for read in tensors:
        assert read(made).isfinite().all()


def finite_rows(table: Any) -> torch.Tensor:
    """The float32 rows without the bounds, which are infinite where nothing is clipped."""
    return table.rows[:, [k for k in range(table.rows.shape[1]) if k not in (2, 3)]]


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly what belongs there."""
    return st.one_of(strategy, strategy, strategy, JUNK)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "steps": maybe(st.integers(1, 12)),
        "timesteps": maybe(st.lists(st.integers(0, 9), min_size=1, unique=True).map(lambda v: sorted(v)[::-1])),
        "spacing": maybe(st.sampled_from(LEVEL_SPACINGS)),
        "steps_offset": maybe(st.integers(0, 2)),
        "prediction_type": maybe(st.sampled_from(PREDICTION_TYPES)),
        "clip_range": maybe(st.sampled_from([None, 1.0, 1e-30, 1e30])),
        "final": maybe(st.sampled_from(FINALS)),
        "sigmas": JUNK,
        "eta": maybe(st.floats(0, 1)),
        "final_alpha_cumprod": maybe(st.floats(0.9, 1)),
        "order": maybe(st.integers(1, 4)),
        "tau": maybe(st.floats(0, 1)),
        "variance_type": maybe(st.sampled_from(VARIANCE_TYPES)),
    },
)


@settings(max_examples=300)
@given(st.sampled_from(sorted(SAMPLERS)), st.lists(BETA, min_size=1, max_size=12), OPTIONS)
def test_a_table_is_finite_or_refused(name, betas, options):
    config = {"trained_betas": tuple(betas), "num_timesteps": len(betas)}
    holds(lambda: make_table(name, DiffusionConfig(**config), **options), finite_rows)


@settings(max_examples=150)
@given(st.lists(BETA, min_size=1, max_size=12), OPTIONS)
def test_an_inversion_is_finite_or_refused(betas, options):
    options = {
        k: v for k, v in options.items() if k in ("steps", "timesteps", "spacing", "prediction_type", "clip_range")
    }
    holds(lambda: ddim_inversion_table(Schedule.from_betas(betas), **options), finite_rows)


@settings(max_examples=150)
@given(maybe(st.lists(BETA, min_size=1, max_size=12)))
def test_a_schedule_is_finite_or_refused(betas):
    names = ("alphas_cumprod", "posterior_variance", "posterior_mean_coef1", "sqrt_recipm1_alphas_cumprod")
    reads = [lambda s, n=name: getattr(s, n)[:-1] for name in names]
    holds(lambda: Schedule.from_betas(betas), *reads, q_rows, q_step_rows, loss_rows)
    holds(lambda: Schedule.from_alphas_cumprod(betas), *reads)


@settings(max_examples=150)
@given(
    maybe(st.sampled_from(sorted(SCHEDULES))),
    maybe(st.integers(1, 40)),
    st.dictionaries(st.sampled_from(["beta_start", "beta_end", "start", "end", "tau"]), maybe(BETA), max_size=2),
)
def test_a_named_schedule_is_finite_or_refused(name, T, ends):
    holds(lambda: Schedule.named(name, T, **ends), lambda s: s.alphas_cumprod)


@settings(max_examples=150)
@given(
    st.dictionaries(
        st.sampled_from(["beta_schedule", "num_timesteps", "beta_start", "beta_end", "trained_betas", "clip_range"])
        | st.sampled_from(["prediction_type", "variance_type", "rescale_betas_zero_snr"]),
        JUNK,
        max_size=3,
    )
)
def test_a_config_is_right_or_refused(values):
    holds(lambda: DiffusionConfig.from_dict(values).schedule(), lambda s: s.alphas_cumprod)


@settings(max_examples=150)
@given(maybe(st.integers(1, 50)), maybe(st.integers(1, 50)), maybe(st.sampled_from(LEVEL_SPACINGS)), JUNK)
def test_timesteps_are_in_range_or_refused(T, steps, spacing, offset):
    def check(make: Callable[[], torch.Tensor]) -> None:
        holds(make, lambda t: torch.where((t.diff() < 0).all() & (t >= 0).all() & (t < T).all(), 0.0, math.nan))

    check(lambda: spaced_timesteps(T, steps, spacing, offset))
    check(lambda: space_timesteps(T, offset))


@settings(max_examples=200)
@given(*[maybe(st.one_of(st.none(), st.lists(st.integers(0, 2**64 - 1), max_size=3)))] * 1, JUNK, JUNK, JUNK)
def test_seeds_are_taken_or_refused(seeds, seed, sample_ids, batch):
    holds(lambda: resolve_seeds(seeds, seed, sample_ids, batch), lambda words: words[0])


def test_betas_too_large_for_float32_are_named():
    with pytest.raises(ValueError, match=r"cannot give x_0 where alpha_bar = 4.92e-134.*smaller betas"):
        make_table("ddpm", DiffusionConfig(beta_end=0.5))
    with pytest.raises(ValueError, match=r"alphas_cumprod\[0\] = 1.0 after 1.0, where betas\[0\] = 1e-17"):
        Schedule.from_betas([1e-17, 0.5])
