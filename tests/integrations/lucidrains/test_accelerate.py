"""What `accelerate` takes over, and what is refused with which advice."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddpm
from fastddpm.integrations.lucidrains import GaussianDiffusion, accelerate
from tests.integrations.lucidrains.cases import (
    SIZE,
    Net,
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
    with pytest.raises(NotImplementedError, match=r"immiscible.*denoising_diffusion_pytorch\.GaussianDiffusion"):
        accelerate(original.GaussianDiffusion(Net(), **options(immiscible=True)))


def follow(message: str, line: int, **names: Any) -> Any:
    """Execute the import that an error's advice begins with, then its line of that number."""
    code = re.findall("`([^`]+)`", message)
    exec(code[0], names)
    return eval(code[line], names)


def drawn_by_the_original(sample: Callable[[], Tensor], shape: tuple[int, ...], steps: int) -> tuple[Tensor, ...]:
    """Return what the original samples, mapped to [-1, 1], and the x_T and z that it drew."""
    torch.manual_seed(3)
    expected = sample() * 2 - 1
    torch.manual_seed(3)
    x_T, *z = torch.randn(steps, *shape)
    return expected, x_T, torch.stack([*z, torch.zeros(shape)])


def test_advice_for_the_one_dimensional_diffusion_works(original: Any) -> None:
    one_dimensional = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d")
    torch.manual_seed(0)
    net = one_dimensional.Unet1D(dim=8, dim_mults=(1, 2), channels=2).eval()
    diffusion = one_dimensional.GaussianDiffusion1D(net, seq_length=8, timesteps=20)
    with pytest.raises(TypeError, match="GaussianDiffusion1D") as refused:
        fastddpm.accelerate(diffusion)
    sampler = follow(str(refused.value), 1, fastddpm=fastddpm, diffusion=diffusion, shape=(2, 8))
    expected, x_T, z = drawn_by_the_original(lambda: diffusion.sample(3), (3, 2, 8), 20)
    assert relative(sampler.sample(x_T=x_T, noise=z), expected) <= 1e-5


def test_advice_for_the_classifier_free_diffusion_works(original: Any) -> None:
    classifier_free = pytest.importorskip("denoising_diffusion_pytorch.classifier_free_guidance")
    torch.manual_seed(0)
    net = classifier_free.Unet(dim=8, num_classes=3, dim_mults=(1, 2)).eval()
    diffusion = classifier_free.GaussianDiffusion(net, image_size=SIZE, timesteps=20)
    with pytest.raises(TypeError, match="classifier_free_guidance") as refused:
        fastddpm.accelerate(diffusion)
    sampler = follow(str(refused.value), 2, fastddpm=fastddpm, diffusion=diffusion, shape=(3, SIZE, SIZE))
    classes = torch.tensor([0, 2])
    options = {"cond_scale": 3.0, "rescaled_phi": 0.7}
    shape = (2, 3, SIZE, SIZE)
    expected, x_T, z = drawn_by_the_original(lambda: diffusion.sample(classes, **options), shape, 20)
    actual = sampler.sample(x_T=x_T, noise=z, model_kwargs={"classes": classes, **options})
    assert relative(actual, expected) <= 1e-5


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
    net = Net()
    net.self_condition = True  # type: ignore[assignment]
    named = r"denoising_diffusion_pytorch\.GaussianDiffusion"
    with pytest.raises(NotImplementedError, match=rf"self_condition.*{named}"):
        GaussianDiffusion(net, **options())
    with pytest.raises(NotImplementedError, match=rf"immiscible.*{named}"):
        GaussianDiffusion(Net(), **options(immiscible=True))
    diffusion, x = GaussianDiffusion(Net(), **options()), torch.zeros(1, 3, SIZE, SIZE)
    with pytest.raises(NotImplementedError, match=rf"interpolate.*{named}"):
        diffusion.interpolate(x, x)
    with pytest.raises(NotImplementedError, match=rf"self-conditioning.*{named}"):
        diffusion.p_sample(x, 3, x)


def test_linear_schedule_of_too_few_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beta = 2\.5.*cosine"):
        GaussianDiffusion(Net(), **options(timesteps=8, beta_schedule="linear"))


def test_sampler_options_reach_the_sampler() -> None:
    diffusion = accelerate(GaussianDiffusion(Net(), **options()), compile="nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        diffusion.sample(1)
