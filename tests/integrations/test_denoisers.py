"""Denoisers D(x; sigma), against the loops of Karras et al. (2022) and k-diffusion in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastddpm
from fastddpm.integrations.denoisers import Denoiser

SHAPE = (2, 3, 8, 8)
Loop = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Net(nn.Module):
    """A denoiser with the preconditioning of Karras et al. (table 1, sigma_data = 0.5) around a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, sigma: Tensor, shift: float = 0.0) -> Tensor:
        assert sigma.shape == (len(x),)
        self.seen.append(sigma)
        s = sigma.to(x.dtype)[:, None, None, None]
        total = s**2 + 0.25
        F = torch.tanh(self.conv(x / total.sqrt()) + 0.25 * s.log())
        return 0.25 / total * x + 0.5 * s / total.sqrt() * F + shift


def karras(n: int, low: float, high: float) -> Tensor:
    """Karras et al. 2022, eq. 5, with rho = 7, and the 0 at its end."""
    i = torch.arange(n, dtype=torch.float64)
    return torch.cat([(high ** (1 / 7) + i / (n - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7, torch.zeros(1)])


def heun(D: nn.Module, x: Tensor, sigmas: Tensor) -> Tensor:
    """Karras et al. 2022, Algorithm 1."""
    for s, after in itertools.pairwise(sigmas):
        d = (x - D(x, s.expand(len(x)))) / s
        euler = x + (after - s) * d
        x = euler if after == 0 else x + (after - s) * (d + (euler - D(euler, after.expand(len(x)))) / after) / 2
    return x


def euler(D: nn.Module, x: Tensor, sigmas: Tensor) -> Tensor:
    """Karras et al. 2022, Algorithm 1 without its second order."""
    for s, after in itertools.pairwise(sigmas):
        x = x + (after - s) * (x - D(x, s.expand(len(x)))) / s
    return x


def dpmpp_2m(D: nn.Module, x: Tensor, sigmas: Tensor) -> Tensor:
    """Lu et al. 2022, Algorithm 2, in k-diffusion's form."""
    old, h_last = None, None
    for s, after in itertools.pairwise(sigmas):
        denoised, h = D(x, s.expand(len(x))), (s / after).log()
        d = denoised if old is None or after == 0 else denoised + h / (2 * h_last) * (denoised - old)
        x = after / s * x - torch.expm1(-h) * d
        old, h_last = denoised, h
    return x


@pytest.mark.parametrize(("low", "high"), [(0.002, 80.0), (0.03, 14.6)])
@pytest.mark.parametrize(("name", "loop"), [("heun", heun), ("euler", euler), ("dpm++2m", dpmpp_2m)])
def test_a_denoisers_samples_are_those_of_its_own_loop(name: str, loop: Loop, low: float, high: float) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    model = Denoiser(net, low, high)
    x_T = torch.randn(SHAPE)
    options = {"steps": 9, "sampler": name, "sampler_options": {"spacing": "karras"}}
    actual = fastddpm.sample(model, SHAPE[1:], x_T=x_T, **options)
    sigmas = karras(9, low, high)
    seen = torch.stack(net.seen)[:, 0]
    visited = sigmas[:-1].repeat_interleave(2)[1:] if name == "heun" else sigmas[:-1]
    torch.testing.assert_close(seen.double(), visited, rtol=1e-6, atol=0)
    with torch.no_grad():
        expected = loop(net.double(), x_T.double() * (1 + sigmas[0] ** 2).sqrt(), sigmas)
    assert float((actual - expected).abs().max() / expected.abs().max()) <= 1e-5


def test_a_denoiser_keeps_the_models_contract() -> None:
    torch.manual_seed(0)
    model = Denoiser(Net().eval())
    ddpm = fastddpm.sample(model, SHAPE[1:], seeds=[1, 2], steps=20, sampler="ddpm")
    assert ddpm.isfinite().all()
    plain, shifted = (
        fastddpm.sample(model, SHAPE[1:], seeds=[1], steps=5, sampler="euler", model_kwargs=kwargs)
        for kwargs in ({}, {"shift": 0.5})
    )
    assert float((shifted - plain).mean()) > 0.4
    low = fastddpm.sample(model, SHAPE[1:], seeds=[1], steps=5, sampler="euler", dtype=torch.bfloat16)
    assert float((low - plain).abs().max()) <= 0.1
    with pytest.raises(ValueError, match="sigma_max"):
        Denoiser(Net(), sigma_min=1.0, sigma_max=0.5)
