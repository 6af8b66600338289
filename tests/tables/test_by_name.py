"""The registry of samplers: a config's settings reach the builder, and options override them."""

from __future__ import annotations

import pytest
import torch

from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.by_name import SAMPLERS, make_table
from fastddpm.tables.ddim import ddim_table
from fastddpm.tables.ddpm import ddpm_table
from fastddpm.tables.dpm_solver import dpm_solver_table

CONFIG = DiffusionConfig(beta_schedule="cosine", prediction_type="v", variance_type="fixed_large", clip_range=2.0)
EXPECTED = {
    "ddpm": lambda: ddpm_table(
        Schedule.cosine(), steps=12, prediction_type="v", variance_type="fixed_large", clip_range=2.0
    ),
    "ddim": lambda: ddim_table(Schedule.cosine(), steps=12, prediction_type="v", clip_range=2.0),
    "dpm++2m": lambda: dpm_solver_table(Schedule.cosine(), steps=12, prediction_type="v", clip_range=2.0),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_make_table_passes_the_config_to_the_builder(name):
    table, expected = make_table(name, CONFIG, steps=12), EXPECTED[name]()
    assert table.name == name
    assert torch.equal(table.rows64, expected.rows64)
    assert torch.equal(table.timesteps, expected.timesteps)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_make_table_marks_learned_variances(name, variance_type):
    assert make_table(name, DiffusionConfig(variance_type=variance_type), steps=5).learned
    assert not make_table(name, DiffusionConfig(), steps=5).learned


def test_make_table_lets_options_override_the_config():
    table = make_table("ddim", CONFIG, timesteps=[900, 40], eta=1.0, clip_range=None)
    expected = ddim_table(Schedule.cosine(), timesteps=[900, 40], eta=1.0, clip_range=None, prediction_type="v")
    assert torch.equal(table.rows64, expected.rows64)
    assert not table.clip


@pytest.mark.parametrize("name", SAMPLERS)
def test_make_table_visits_every_timestep_by_default(name):
    assert torch.equal(make_table(name, CONFIG).timesteps, torch.arange(999, -1, -1))


def test_make_table_refuses_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"unknown sampler 'euler'; choose one of ddpm, ddim, dpm\+\+2m"):
        make_table("euler", CONFIG)
    with pytest.raises(TypeError, match="eta"):
        make_table("ddpm", CONFIG, eta=1.0)
