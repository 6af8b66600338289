"""What `accelerate` takes over, and what is refused with which advice."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

import fastddpm
from fastddpm.integrations.lucidrains import GaussianDiffusion, accelerate
from tests.integrations.lucidrains.cases import (
    SIZE,
    Net,
    images,
    options,
    pair,
    relative,
    seeded_sample,
)

pytestmark = pytest.mark.filterwarnings("ignore:the schedule does not end near a Gaussian")


def test_accelerate_takes_over_a_live_instance(original: Any) -> None:
    theirs, _ = pair(original, sampling_timesteps=10, ddim_sampling_eta=0.3, auto_normalize=False)
    ours = accelerate(theirs)
    assert isinstance(ours, GaussianDiffusion)
    assert ours.model is theirs.model
    assert relative(seeded_sample(ours, batch_size=2)[0], seeded_sample(theirs, batch_size=2)[0]) <= 1e-5
    assert ours.training == theirs.training
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert accelerate(ours) is ours


def test_accelerate_refuses_what_it_would_change(original: Any) -> None:
    class Changed(original.GaussianDiffusion):
        pass

    with pytest.raises(TypeError, match=r"Changed.*load the state_dict"):
        accelerate(Changed(Net(), **options()))
    with pytest.raises(TypeError, match="Linear"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match=r"immiscible.*denoising_diffusion_pytorch's"):
        accelerate(original.GaussianDiffusion(Net(), **options(immiscible=True)))


def test_advice_for_another_diffusion_with_the_same_buffers_works(original: Any) -> None:
    foreign, _ = pair(original, timesteps=20)
    other = copy.copy(foreign)
    other.__class__ = type("Foreign", (nn.Module,), {"device": foreign.device})
    with pytest.raises(TypeError, match="Foreign") as refused:
        accelerate(other)
    code = re.findall("`([^`]+)`", str(refused.value))
    names: dict[str, Any] = {"fastddpm": fastddpm, "diffusion": other, "shape": (3, SIZE, SIZE)}
    exec(code[0], names)
    sampler = eval(code[1], names)
    torch.manual_seed(3)
    expected = foreign.sample(3) * 2 - 1
    torch.manual_seed(3)
    x_T, *z = torch.randn(20, 3, 3, SIZE, SIZE)
    z.append(torch.zeros(3, 3, SIZE, SIZE))
    assert relative(sampler.sample(x_T=x_T, noise=torch.stack(z)), expected) <= 1e-5


def test_advice_for_the_inpainting_diffusion_works(original: Any) -> None:
    repaint = pytest.importorskip("denoising_diffusion_pytorch.repaint")
    diffusion = repaint.GaussianDiffusion(Net().eval(), image_size=SIZE, timesteps=20)
    with pytest.raises(TypeError, match=r"repaint.*mask= \(1 where to draw\) and known=") as refused:
        accelerate(diffusion)
    code = re.findall("`([^`]+)`", str(refused.value))
    names: dict[str, Any] = {"fastddpm": fastddpm, "diffusion": diffusion, "shape": (3, SIZE, SIZE)}
    exec(code[0], names)
    sampler = eval(code[1], names)
    known, drawn = images(2, batch=1) * 2 - 1, torch.rand(SIZE, SIZE) > 0.5
    x = sampler.sample(seeds=[1, 2], known=known, mask=drawn)
    assert torch.equal(x[:, :, ~drawn], known.expand_as(x)[:, :, ~drawn])
    assert float((x[0] - x[1])[:, drawn].abs().max()) > 0.01


def test_network_in_data_parallel_is_looked_through() -> None:
    plain, wrapped = (GaussianDiffusion(Net().eval(), **options(sampling_timesteps=5)) for _ in range(2))
    wrapped.model = nn.DataParallel(wrapped.model)
    assert torch.equal(wrapped.sample(seeds=[1, 2]), plain.sample(seeds=[1, 2]))
    around = GaussianDiffusion(nn.DataParallel(Net().eval()), **options(sampling_timesteps=5))
    assert torch.equal(around.sample(seeds=[1, 2]), plain.sample(seeds=[1, 2]))


def test_accelerate_takes_a_live_instance_whose_network_was_wrapped(original: Any) -> None:
    theirs, _ = pair(original, sampling_timesteps=5)
    theirs.model = nn.DataParallel(theirs.model)
    ours = accelerate(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    results = [seeded_sample(diffusion, batch_size=2) for diffusion in (theirs, ours)]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-5)


def test_unknown_arguments_are_named_at_once() -> None:
    diffusion = GaussianDiffusion(Net().eval(), **options())
    with pytest.raises(TypeError, match=r"'compil'.*did you mean 'compile'"):
        accelerate(diffusion, compil=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'sedes'"):
        diffusion.sample(sedes=[1])  # type: ignore[call-arg]


def test_bad_input_raises_what_the_original_raises(original: Any) -> None:
    for changes in (
        {"objective": "pred_w"},
        {"beta_schedule": "quadratic"},
        {"image_size": (8, 8, 8)},
        {"sampling_timesteps": 51},
        {"schedule_fn_kwargs": {"gamma": 1}},
    ):
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            original.GaussianDiffusion(Net(), **options(**changes))
        with pytest.raises(type(theirs.value)):
            GaussianDiffusion(Net(), **options(**changes))
    with pytest.raises(AssertionError, match="height and width of image must be"):
        GaussianDiffusion(Net(), **options())(torch.zeros(1, 3, 4, 8))


def test_unsupported_features_name_the_original() -> None:
    with pytest.raises(NotImplementedError, match=r"immiscible.*denoising_diffusion_pytorch's"):
        GaussianDiffusion(Net(), **options(immiscible=True))


def test_linear_schedule_of_too_few_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beta = 2\.5.*cosine"):
        GaussianDiffusion(Net(), **options(timesteps=8, beta_schedule="linear"))


def test_sampler_options_reach_the_sampler() -> None:
    diffusion = accelerate(GaussianDiffusion(Net(), **options()), compile="nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        diffusion.sample(1)
