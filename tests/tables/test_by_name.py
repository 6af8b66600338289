"""The registry of samplers: names and aliases, a config's settings reach the builder, and options override them."""

from __future__ import annotations

import pytest
import torch

from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.by_name import SAMPLERS, make_table
from fastddpm.tables.ddim import ddim_table
from fastddpm.tables.ddpm import ddpm_table
from fastddpm.tables.names import NAMES, canonical, listing
from fastddpm.tables.unipc import unipc_table

CONFIG = DiffusionConfig(beta_schedule="cosine", prediction_type="v", variance_type="fixed_large", clip_range=2.0)


def test_every_sampler_has_one_line_and_a_builder():
    assert {entry.name for entry in NAMES} == {*SAMPLERS, "fast", "tuned"}
    lines = [line for line in listing().splitlines() if not line.startswith("    =")]
    assert len(lines) == len(NAMES)
    for line, entry in zip(lines, NAMES, strict=True):
        assert line.split()[:3] == [entry.name, "stochastic" if entry.stochastic else "deterministic", str(entry.calls)]
    for name in ("dpm-solver++", "dpmpp_2m", "unipc", "euler_ancestral"):
        assert name in listing()


def test_a_tuned_table_belongs_to_a_model():
    with pytest.raises(ValueError, match="belong to a model"):
        make_table("tuned", CONFIG)


@pytest.mark.parametrize("entry", [e for e in NAMES if e.name != "tuned"], ids=lambda entry: entry.name)
def test_what_the_registry_says_of_a_sampler_holds(entry):
    table = make_table(entry.name, DiffusionConfig(), steps=6)
    assert bool((table.column("sigma") > 0).any()) == entry.stochastic
    assert len(table) == (11 if entry.calls == 2 else 6)
    assert entry.name == "fast" or table.name == entry.name
    assert table.clip == ("clip" not in entry.use)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("DPM++ 2M", "dpm++2m"),
        ("dpm-solver++", "dpm++2m"),
        ("dpmpp_2m", "dpm++2m"),
        ("dpmpp_2m_sde", "dpm++2m_sde"),
        ("dpmpp-3m-sde", "dpm++3m_sde"),
        ("UniPC", "unipc3"),
        ("euler_a", "euler_a"),
        ("Euler Ancestral", "euler_a"),
        ("EulerAncestralDiscreteScheduler", "euler_a"),
        ("DDIM", "ddim"),
        ("DEISMultistepScheduler", "deis"),
    ],
)
def test_aliases_lead_to_their_sampler(alias, name):
    assert canonical(alias) == name


def test_no_alias_is_claimed_twice():
    spellings = [alias for entry in NAMES for alias in (entry.name, *entry.aliases)]
    assert [canonical(spelling) for spelling in spellings] == [
        entry.name for entry in NAMES for _ in (entry.name, *entry.aliases)
    ]


def test_make_table_passes_the_config_to_the_builder():
    settings = {"steps": 12, "prediction_type": "v", "clip_range": 2.0}
    expected = {
        "ddpm": ddpm_table(Schedule.cosine(), variance_type="fixed_large", **settings),
        "ddim": ddim_table(Schedule.cosine(), **settings),
        "unipc3": unipc_table(Schedule.cosine(), **settings),
    }
    for name, table in expected.items():
        assert torch.equal(make_table(name, CONFIG, steps=12).rows64, table.rows64)
        assert torch.equal(make_table(name, CONFIG, steps=12).timesteps, table.timesteps)


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


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "heun"])
def test_make_table_visits_every_timestep_by_default(name):
    config = DiffusionConfig(beta_schedule="cosine", num_timesteps=30)
    assert torch.equal(make_table(name, config).timesteps, torch.arange(29, -1, -1))


def test_fast_brings_its_steps():
    config = DiffusionConfig()
    assert torch.equal(make_table("fast", config).rows64, make_table("unipc3", config, steps=8).rows64)
    guided = make_table("fast", config, guided=True)
    assert torch.equal(guided.rows64, make_table("unipc2", config, steps=10).rows64)
    assert len(make_table("fast", config, steps=5)) == 5
    assert len(make_table("fast", config, timesteps=[900, 400, 20])) == 3
    assert len(make_table("fast", DiffusionConfig(beta_schedule="cosine", num_timesteps=4))) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unipcc", r"unknown sampler 'unipcc' \(did you mean 'unipc'\?\); choose one of ddpm, ddim, fast"),
        ("dpm-solver", r"unknown sampler 'dpm-solver' \(did you mean 'dpm-solver\+\+'\?\)"),
        ("zzz", "unknown sampler 'zzz'; choose one of ddpm"),
        (None, "unknown sampler None; choose one of ddpm"),
    ],
)
def test_make_table_names_the_nearest_sampler(name, message):
    with pytest.raises(ValueError, match=message):
        make_table(name, CONFIG)


def test_make_table_refuses_unknown_options():
    with pytest.raises(TypeError, match="eta"):
        make_table("ddpm", CONFIG, eta=1.0)
    with pytest.raises(TypeError, match="unipc3 has no option 'step'; did you mean 'steps'"):
        make_table("unipc", CONFIG, step=5)
    with pytest.raises(ValueError, match="deis keeps eps, and x_0 cannot be clipped"):
        make_table("deis", CONFIG, clip_range=1.0)
