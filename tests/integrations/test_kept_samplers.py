"""When a drop-in's sampler gets compiled: the batch, the steps and the calls so far."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fastddpm.integrations.kept_samplers import KeptSamplers
from fastddpm.integrations.lucidrains import GaussianDiffusion
from fastddpm.integrations.openai import GaussianDiffusion as OpenAIDiffusion
from fastddpm.integrations.openai import LossType, ModelMeanType, ModelVarType
from fastddpm.sampling import options
from fastddpm.sampling.sampler import Sampler
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.ddpm import ddpm_table
from tests.integrations.diffusers.cases import tiny_unet

SHAPE = (1, 4, 4)


class Net(nn.Module):
    channels, out_dim, self_condition = 1, 1, False

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, x_self_cond: None = None) -> torch.Tensor:
        return self.layer(x)


def get(samplers: KeptSamplers, batch: int, **given: Any) -> Sampler:
    table = ddpm_table(Schedule.linear(10))
    return samplers.get("key", NET, table, SHAPE, batch=batch, device=torch.device("cpu"), options=given)


NET = Net().eval()


@pytest.fixture
def _repaid_after_80_network_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "REPAYS_AFTER", 80 * options.weight_uses(NET, SHAPE))
    monkeypatch.setattr(options.torch_compile, "has_cpp_compiler", lambda: True)


@pytest.mark.usefixtures("_repaid_after_80_network_calls")
def test_sampler_that_keeps_being_called_is_compiled_once_that_pays(caplog: pytest.LogCaptureFixture) -> None:
    samplers = KeptSamplers()
    with caplog.at_level(logging.INFO, "fastddpm"):
        compiled = [get(samplers, batch=2).options.compiles for _ in range(6)]
    # 2 samples of 10 steps each call.
    assert compiled == [False, False, False, True, True, True]
    decisions = [record.message.split(" (")[0] for record in caplog.records if "compile" in record.message]
    assert decisions == [
        "compile='auto': the model runs uncompiled",
        "compile='auto': the model runs compiled",
    ]
    assert get(KeptSamplers(), batch=8).options.compiles


@pytest.mark.usefixtures("_repaid_after_80_network_calls")
@pytest.mark.parametrize("given", [{"compile": False}, {"samples_ahead": 1}])
def test_callers_decision_about_compilation_stands(given: dict[str, Any]) -> None:
    samplers = KeptSamplers()
    kept = [get(samplers, batch=100, **given) for _ in range(3)]
    assert not kept[0].options.compiles
    assert kept[0] is kept[1] is kept[2]


def test_two_samplers_are_kept_and_copies_are_empty() -> None:
    samplers = KeptSamplers()
    first = get(samplers, 1, compile=False)
    assert get(samplers, 1, compile=False) is first
    get(samplers, 1, check_finite=True)
    assert get(samplers, 1, compile=False) is first
    get(samplers, 1, backend="torch")
    assert [kept.key[1] for kept in samplers.kept] == [{"backend": "torch"}, {"compile": False}]
    assert copy.deepcopy(samplers).kept == pickle.loads(pickle.dumps(samplers)).kept == []


def draw_by_lucidrains(batch: int) -> None:
    GaussianDiffusion(NET, image_size=4, timesteps=50, sampling_timesteps=10).sample(batch)


def draw_by_openai(batch: int) -> None:
    types = {"model_mean_type": ModelMeanType.EPSILON, "model_var_type": ModelVarType.FIXED_SMALL}
    diffusion = OpenAIDiffusion(betas=[0.1] * 10, loss_type=LossType.MSE, **types)
    diffusion.p_sample_loop(NET, (batch, *SHAPE))


def draw_by_diffusers(batch: int) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    import fastddpm

    pipe = fastddpm.accelerate(diffusers.DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler()))
    pipe.set_progress_bar_config(disable=True)
    pipe(batch_size=batch, num_inference_steps=10, output_type="pt")


@pytest.mark.parametrize("draw", [draw_by_diffusers, draw_by_lucidrains, draw_by_openai])
def test_every_drop_in_counts_batch_and_steps(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def decide(choice: Any, device: Any, model: Any, shape: Any, calls_ahead: int) -> options.Want:
        counted.append(calls_ahead)
        return options.Want.NEVER

    monkeypatch.setattr(options, "decide_compile", decide)
    draw(3)
    assert counted == [30]


@pytest.mark.parametrize("change", ["data", "load_state_dict", "hook"])
def test_every_drop_in_follows_its_network(change: str) -> None:
    net, other = Net().eval(), Net().eval()
    diffusion = GaussianDiffusion(net, image_size=4, timesteps=50, sampling_timesteps=5)
    types = {"model_mean_type": ModelMeanType.EPSILON, "model_var_type": ModelVarType.FIXED_SMALL}
    openai = OpenAIDiffusion(betas=[0.1] * 5, loss_type=LossType.MSE, **types)

    def draw(model: Net, of: GaussianDiffusion) -> torch.Tensor:
        return torch.cat([of.sample(seeds=[1, 2]), openai.p_sample_loop(model, (2, *SHAPE), seeds=[1, 2])])

    before = draw(net, diffusion)
    if change == "data":
        for parameter, value in zip(net.parameters(), other.parameters(), strict=True):
            parameter.data.copy_(value)
    elif change == "load_state_dict":
        net.load_state_dict(other.state_dict())
    else:
        for model in (net, other):
            model.layer.register_forward_hook(lambda module, args, output: 2 * output)
        other.load_state_dict(net.state_dict())
    after = draw(net, diffusion)
    made_anew = GaussianDiffusion(other, image_size=4, timesteps=50, sampling_timesteps=5)
    assert torch.equal(after, draw(other, made_anew))
    assert not torch.equal(after, before)


def test_average_of_a_whole_diffusion_is_followed() -> None:
    # As the Trainer of denoising-diffusion-pytorch keeps it.
    EMA = pytest.importorskip("ema_pytorch").EMA
    diffusion = GaussianDiffusion(Net().eval(), image_size=4, timesteps=50, sampling_timesteps=5)
    ema = EMA(diffusion, beta=0.5, update_after_step=0, update_every=1)
    last = None
    for _ in range(3):
        for parameter in diffusion.model.parameters():
            parameter.data.mul_(1.5)
        ema.update()
        images = ema.ema_model.sample(seeds=[1, 2])
        made_anew = GaussianDiffusion(ema.ema_model.model, image_size=4, timesteps=50, sampling_timesteps=5)
        assert torch.equal(images, made_anew.sample(seeds=[1, 2]))
        assert last is None or not torch.equal(images, last)
        last = images
