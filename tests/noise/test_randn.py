"""fastddpm.randn: what a user asks of it, and its distribution over 2**24 normals."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.special import erfc
from torch import Tensor

import fastddpm
from fastddpm.noise import v1 as noise

N = 1 << 24
SAMPLES = 16
# Bounds are this many standard errors.
K = 5


def test_randn_gives_equal_images_for_equal_seeds() -> None:
    z = fastddpm.randn((3, 2, 5, 5), seeds=[8, 2**64 - 1, 8])
    assert torch.equal(z[0], z[2])
    assert not torch.equal(z[0], z[1])
    assert torch.equal(z[1:2], fastddpm.randn((1, 2, 5, 5), seeds=[2**64 - 1]))


def test_randn_does_not_depend_on_the_split_over_ranks() -> None:
    whole = fastddpm.randn((5, 7), seed=3, step=9, stream=0)
    parts = [fastddpm.randn((len(r), 7), seed=3, sample_ids=r, step=9, stream=0) for r in (range(2), range(2, 5))]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_randn_rounds_once(dtype: torch.dtype) -> None:
    assert torch.equal(fastddpm.randn((2, 999), seed=1, dtype=dtype), fastddpm.randn((2, 999), seed=1).to(dtype))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1,), (2, 1), (1, 3, 2, 2)], ids=str)
def test_randn_has_the_shape_asked_for(shape: tuple[int, ...]) -> None:
    z = fastddpm.randn(shape, seed=1)
    assert z.shape == shape
    assert z.is_contiguous()


def test_randn_tells_seeds_ids_steps_and_streams_apart() -> None:
    draws = [fastddpm.randn((1, 64), seed=s, sample_ids=[k]) for s in (0, 1, 2**32, 2**63) for k in (0, 1, 2**31)]
    draws += [fastddpm.randn((1, 64), seed=0, step=n, stream=m) for n in (1, 2**31, 2**32 - 1) for m in range(5)]
    assert len({tuple(z.flatten().tolist()) for z in draws}) == len(draws)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must be an integer >= 0 and <= 2"),
        ({"seed": 0, "step": 2**32}, "step must be an integer >= 0 and <= 2"),
        ({"seed": 0, "step": 0.5}, "step must be an integer"),
        ({"seed": 0, "stream": -1}, "stream must be an integer >= 0 and <= 2"),
        ({}, "exactly one"),
        ({"seeds": [1]}, "1 seeds or sample ids for a batch of 2"),
    ],
    ids=["seed", "step", "float", "stream", "none", "count"],
)
def test_randn_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastddpm.randn((2, 3), **arguments)  # type: ignore[arg-type]


def test_randn_refuses_a_scalar_shape_and_other_dtypes() -> None:
    with pytest.raises(ValueError, match="samples first"):
        fastddpm.randn((), seed=0)
    with pytest.raises(TypeError, match="float64"):
        fastddpm.randn((1, 2), seed=0, dtype=torch.float64)


@pytest.fixture(scope="module")
def normals() -> Tensor:
    """2**24 normals: 16 samples of one seed."""
    return fastddpm.randn((SAMPLES, N // SAMPLES), seed=2024)


def test_randn_has_the_moments_of_a_standard_normal(normals: Tensor) -> None:
    """Sample moments of k-th order have variance (E z**2k - (E z**k)**2) / N; for a normal E z**2k = (2k - 1)!!."""
    z = normals.double()
    power = z.clone()
    for order, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        if order > 1:
            power *= z
        assert abs(power.mean().item() - mean) <= K * math.sqrt(variance / N), f"moment {order}"


def test_randn_passes_kolmogorov_smirnov(normals: Tensor) -> None:
    """P(sqrt(N) * D > 2.7) is about 2 exp(-2 * 2.7**2) = 9e-7, as rare as 5 standard errors."""
    cdf = torch.special.ndtr(normals.flatten().sort().values.double())
    grid = torch.arange(N + 1, dtype=torch.float64) / N
    distance = max((grid[1:] - cdf).max().item(), (cdf - grid[:-1]).max().item())
    assert distance * math.sqrt(N) <= 2.7


@pytest.mark.parametrize("sigma", [2.0, 3.0, 4.0, 4.75])
def test_randn_has_normal_tails(normals: Tensor, sigma: float) -> None:
    for tail in ((normals > sigma).sum().item(), (normals < -sigma).sum().item()):
        expected = N * 0.5 * erfc(sigma / math.sqrt(2))
        assert abs(tail - expected) <= K * math.sqrt(expected)


def test_randn_reaches_beyond_5_7_sigma_at_the_right_rate() -> None:
    """Radii of 2**26 word pairs (2**27 normals): a radius beyond r has probability exp(-r**2 / 2)."""
    seed, zero = torch.tensor([5]), torch.tensor([0])
    beyond = {5.0: 0, 5.7: 0}
    block = 1 << 14
    for start in range(0, 1 << 25, block):
        r = noise.philox(seed, zero, zero, 1, torch.arange(start, start + block))
        for word in (r[0], r[2]):
            # Only words this small give radii beyond 5 sigma, and the accuracy of the others is tested elsewhere.
            rare = word[word < 20_000]
            cos, sin = noise.box_muller(rare, torch.zeros_like(rare))
            radius = torch.hypot(cos, sin)
            for sigma in beyond:
                beyond[sigma] += int((radius > sigma).sum())
    for sigma, count in beyond.items():
        expected = (1 << 26) * math.exp(-(sigma**2) / 2)
        assert abs(count - expected) <= K * math.sqrt(expected), (
            f"{count} radii beyond {sigma}, expected {expected:.1f}"
        )


def correlation(x: Tensor, y: Tensor) -> float:
    return float((x.double() * y.double()).mean()) * math.sqrt(x.numel())


def test_randn_does_not_correlate_with_its_neighbours(normals: Tensor) -> None:
    """The mean of products has standard error 1 / sqrt(N); so have the squares' after scaling by their variance, 2."""
    z = normals[:4]
    for lag in (1, 2, 3, 4, 5, 64):
        assert abs(correlation(z[:, :-lag], z[:, lag:])) <= K
        assert abs(correlation(z[:, :-lag] ** 2 - 1, z[:, lag:] ** 2 - 1)) <= 2 * K
    for first in range(3):
        for second in range(first + 1, 4):
            assert abs(correlation(z[first], z[second])) <= K


def test_randn_does_not_correlate_across_steps_seeds_and_streams() -> None:
    n, keywords = 1 << 19, ("seed", "step", "stream")
    base = fastddpm.randn((1, n), seed=1, step=1, stream=1)
    for name in keywords:
        for value in (0, 2, 3):
            other = fastddpm.randn((1, n), **{"seed": 1, "step": 1, "stream": 1, name: value})
            assert abs(correlation(base, other)) <= K, f"{name} {value}"
            assert abs(correlation(base**2 - 1, other**2 - 1)) <= 2 * K, f"{name} {value}"
