"""The diffusion config: what it builds, what it refuses, and its exchange with diffusers' scheduler_config.json."""

from __future__ import annotations

import dataclasses
import json
import math
import time

import numpy as np
import pytest
import torch

from fastddpm.schedules.betas import SCHEDULES
from fastddpm.schedules.diffusion import PREDICTION_TYPES, VARIANCE_TYPES, DiffusionConfig
from fastddpm.schedules.schedule import Schedule

CONFIGS = {
    "default": DiffusionConfig(),
    "ends": DiffusionConfig(num_timesteps=500, beta_start=1e-3, beta_end=0.03, variance_type="fixed_large"),
    "zero_snr": DiffusionConfig(rescale_betas_zero_snr=True, prediction_type="v", clip_range=None),
    "betas": DiffusionConfig(trained_betas=(0.5, 0.9, 0.95), num_timesteps=3, clip_range=2.5),
    "learned": DiffusionConfig(beta_schedule="cosine", num_timesteps=4000, variance_type="learned"),
    "learned_range": DiffusionConfig(beta_schedule="cosine", variance_type="learned_range", prediction_type="x_0"),
}


def test_default_config_is_ho_et_al():
    config = DiffusionConfig()
    assert torch.equal(config.schedule().betas, Schedule.linear(1000, 1e-4, 0.02).betas)
    assert (config.prediction_type, config.variance_type, config.clip_range) == ("epsilon", "fixed_small", 1.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_config_builds_the_named_schedule(name):
    assert torch.equal(DiffusionConfig(beta_schedule=name).schedule().betas, Schedule.named(name).betas)


def test_config_passes_the_ends_of_beta_on():
    betas = DiffusionConfig(beta_schedule="scaled_linear", beta_start=8.5e-4, beta_end=0.012).schedule().betas
    assert torch.equal(betas, Schedule.scaled_linear(1000, 8.5e-4, 0.012).betas)


def test_config_builds_zero_terminal_snr_and_explicit_betas():
    zero_snr = CONFIGS["zero_snr"].schedule()
    assert torch.equal(zero_snr.betas, Schedule.linear().zero_terminal_snr().betas)
    betas = CONFIGS["betas"].schedule().betas
    assert betas.tolist() == [0.5, 0.9, 0.95]


def test_schedule_warns_about_the_end_that_is_used():
    with pytest.warns(UserWarning, match="alpha_bar_T = 0.603 after T = 50 steps") as caught:
        DiffusionConfig(num_timesteps=50).schedule()
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_schedule_does_not_warn_when_the_rescaled_end_is_gaussian():
    DiffusionConfig(num_timesteps=50, rescale_betas_zero_snr=True, prediction_type="v").schedule()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_config_survives_json(config):
    assert DiffusionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_number_of_timesteps_may_be_numpys() -> None:
    config = DiffusionConfig(num_timesteps=np.int64(10))
    assert json.loads(json.dumps(config.to_dict()))["num_timesteps"] == 10


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_config_survives_the_scheduler_config(config):
    exchanged = json.loads(json.dumps(config.to_scheduler_config()))
    assert DiffusionConfig.from_scheduler_config(exchanged) == config


@pytest.mark.parametrize("name", ["linear_rescaled", "sigmoid_jabri"])
def test_scheduler_config_carries_unknown_schedules_as_betas(name):
    config = DiffusionConfig(beta_schedule=name, num_timesteps=100)
    back = DiffusionConfig.from_scheduler_config(config.to_scheduler_config())
    assert torch.equal(back.schedule().betas, config.schedule().betas)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.filterwarnings("error")
def test_scheduler_config_builds_the_same_process_in_diffusers(config):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
    scheduler = diffusers.DDPMScheduler.from_config(config.to_scheduler_config())
    # Their cumulative product is float32.
    torch.testing.assert_close(
        scheduler.alphas_cumprod.double(), config.schedule().alphas_cumprod, rtol=1e-3, atol=1e-8
    )
    theirs = scheduler.config
    assert theirs.variance_type == config.variance_type
    assert theirs.clip_sample == (config.clip_range is not None)
    assert (
        theirs.prediction_type == {"epsilon": "epsilon", "x_0": "sample", "v": "v_prediction"}[config.prediction_type]
    )


@pytest.mark.parametrize("theirs", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_from_scheduler_config_reads_every_beta_schedule_of_diffusers(theirs):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
    scheduler = diffusers.DDPMScheduler(beta_schedule=theirs)
    config = DiffusionConfig.from_scheduler_config(dict(scheduler.config))
    torch.testing.assert_close(scheduler.betas.double(), config.schedule().betas, rtol=2e-5, atol=1e-7)
    assert config.to_scheduler_config()["beta_schedule"] == theirs


@pytest.mark.parametrize("scheduler_name", ["DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler"])
def test_from_scheduler_config_reads_what_diffusers_saves(scheduler_name, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
    scheduler = getattr(diffusers, scheduler_name)(
        num_train_timesteps=600,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample_range=2.0,
    )
    scheduler.save_config(tmp_path)
    config = DiffusionConfig.from_scheduler_config(json.loads((tmp_path / "scheduler_config.json").read_text()))
    expected = DiffusionConfig(beta_schedule="cosine", num_timesteps=600, prediction_type="v", clip_range=2.0)
    assert config == expected


def test_from_scheduler_config_reads_the_cifar10_checkpoint():
    # scheduler_config.json of google/ddpm-cifar10-32.
    published = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.1.1",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "trained_betas": None,
        "variance_type": "fixed_large",
    }
    assert DiffusionConfig.from_scheduler_config(published) == DiffusionConfig(variance_type="fixed_large")


@pytest.mark.parametrize(("theirs", "ours"), [("fixed_small_log", "fixed_small"), ("fixed_large_log", "fixed_large")])
def test_from_scheduler_config_maps_log_variances_to_the_same_std(theirs, ours):
    assert DiffusionConfig.from_scheduler_config({"variance_type": theirs}).variance_type == ours


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_scheduel": "linear"}, "unknown keys in the scheduler config: 'beta_scheduel'"),
        ({"beta_schedule": "karras"}, "unknown beta_schedule 'karras' in the scheduler config; known: linear"),
        ({"beta_schedule": ["linear"]}, r"unknown beta_schedule \['linear'\]"),
        ({"prediction_type": "flow_prediction"}, "unknown prediction_type 'flow_prediction'"),
        ({"variance_type": "learned"}, "output as the variance itself.*use 'learned_range'"),
        ({"variance_type": "other"}, "unknown variance_type 'other'"),
        ({"thresholding": True}, "dynamic thresholding is not supported"),
        ({"clip_sample": True, "clip_sample_range": -1.0}, "clip_range must be positive"),
        ({"rescale_betas_zero_snr": "no"}, "rescale_betas_zero_snr must be true or false .*, got 'no'"),
        ({"clip_sample": "false"}, "clip_sample must be true or false .*, got 'false'"),
        ({"thresholding": 0}, "thresholding must be true or false .*, got 0"),
        ({"clip_sample_range": math.inf}, "clip_sample_range must be finite .*, got inf"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "another process"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "another process"),
        ({"num_train_timesteps": "1000"}, "num_timesteps must be an integer >= 1 and <= 1000000, got '1000'"),
        ({"num_train_timesteps": 10**9}, "num_timesteps must be an integer >= 1 and <= 1000000, got 1000000000"),
        ({"beta_start": None}, "beta_start must be a finite number > 0.0 and < 1.0, got None"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 values, but num_timesteps is 1000"),
        (
            {"trained_betas": ["0.1"], "num_train_timesteps": 1},
            "must be a finite number, got '0.1'",
        ),
        ({"trained_betas": {"0": 0.1}}, "trained_betas must be a list of numbers, got dict"),
    ],
)
def test_from_scheduler_config_refuses_what_it_cannot_honour(config, message):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        DiffusionConfig.from_scheduler_config(config)
    assert time.perf_counter() - start < 1.0


def test_from_dict_refuses_unknown_keys():
    with pytest.raises(ValueError, match="unknown keys in the diffusion config: T, betas"):
        DiffusionConfig.from_dict({"T": 1000, "betas": "linear"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "sample"),
        ("variance_type", "fixed"),
        ("num_timesteps", 0),
        ("num_timesteps", 1.5),
        ("beta_start", 0.0),
        ("beta_end", 1.0),
        ("beta_end", True),
        ("clip_range", 0),
        ("clip_range", "1"),
    ],
)
def test_config_refuses_bad_fields_by_name_and_value(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*{value!r}"):
        DiffusionConfig(**{field: value})


def test_config_is_frozen_hashable_and_comparable():
    config = DiffusionConfig(trained_betas=[0.5, 0.9], num_timesteps=2)
    assert config == DiffusionConfig(trained_betas=(0.5, 0.9), num_timesteps=2)
    assert hash(config) == hash(DiffusionConfig(trained_betas=(0.5, 0.9), num_timesteps=2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_timesteps = 5


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_every_type_survives_the_scheduler_config(prediction_type, variance_type):
    config = DiffusionConfig(prediction_type=prediction_type, variance_type=variance_type)
    assert DiffusionConfig.from_scheduler_config(config.to_scheduler_config()) == config
