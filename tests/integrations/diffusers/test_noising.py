"""add_noise and get_velocity of the fast schedulers against diffusers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from fastddpm.integrations.diffusers import FastDDIMScheduler, FastDDPMScheduler
from tests.integrations.diffusers.cases import normal
from tests.ops.pairs import all_pairs, case_id

CASES = all_pairs(
    {
        "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
        "rescale_betas_zero_snr": [False, True],
        "dtype": [torch.float32, torch.float64, torch.bfloat16, torch.float16],
        "method": ["add_noise", "get_velocity"],
        "shape": [(4, 3, 5, 7), (4, 2), (4, 3, 2, 4, 4)],
        "timesteps": [
            torch.tensor([0, 1, 500, 999]),
            torch.tensor([7]),
            torch.tensor(7),
            torch.tensor([9, 2, 0, 3]).int(),
        ],
    }
)
PAIRS = [(FastDDPMScheduler, DDPMScheduler), (FastDDIMScheduler, DDIMScheduler)]
BOTH = pytest.mark.parametrize(("fast", "original"), PAIRS, ids=["ddpm", "ddim"])


@BOTH
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_noising_matches_diffusers_in_float32(fast: Any, original: Any, case: dict[str, Any]) -> None:
    config = {key: case[key] for key in ("beta_schedule", "rescale_betas_zero_snr")}
    dtype = case["dtype"]
    x, eps = normal(*case["shape"], seed=1, dtype=dtype), normal(*case["shape"], seed=2, dtype=dtype)
    actual = getattr(fast(**config), case["method"])(x, eps, case["timesteps"])
    if dtype == torch.float64:
        expected = getattr(original(**config), case["method"])(x, eps, case["timesteps"])
    else:
        # Half precision is float32 rounded once; diffusers rounds alpha_bar, and that is what was repaired.
        expected = getattr(original(**config), case["method"])(x.float(), eps.float(), case["timesteps"]).to(dtype)
    assert torch.equal(actual, expected)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_add_noise_in_half_precision_adds_noise_at_every_timestep(fast: Any, original: Any, dtype: torch.dtype) -> None:
    t = torch.arange(10)
    zero, one = torch.zeros(10, 1, dtype=dtype), torch.ones(10, 1, dtype=dtype)
    assert float(original().add_noise(zero, one, t)[0]) == 0.0
    sigma = (1 - original().alphas_cumprod[:10]).sqrt()[:, None]
    torch.testing.assert_close(fast().add_noise(zero, one, t).float(), sigma, rtol=torch.finfo(dtype).eps, atol=0)


@BOTH
def test_add_noise_broadcasts_and_promotes_as_diffusers(fast: Any, original: Any) -> None:
    x, eps = normal(1, 3, 4, 4, seed=1), normal(5, 3, 4, 4, seed=2)
    t = torch.tensor([1, 2, 3, 4, 5])
    for arguments in ((x, eps, t), (eps, x, t), (x, x, t), (x, eps, t[:1]), (x.half(), eps, t), (x.double(), eps, t)):
        actual, expected = (scheduler.add_noise(*arguments) for scheduler in (fast(), original()))
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        if arguments[0].dtype != torch.float16:
            assert torch.equal(actual, expected)


@BOTH
def test_add_noise_leaves_the_scheduler_as_it_is(fast: Any, original: Any) -> None:
    scheduler = fast()
    table = scheduler.alphas_cumprod
    x = torch.zeros(2, 3, device="meta")
    assert scheduler.add_noise(x, x, torch.tensor([1, 2])).device.type == "meta"
    assert scheduler.alphas_cumprod is table
    theirs = original()
    theirs.add_noise(x, x, torch.tensor([1, 2], device="meta"))
    assert theirs.alphas_cumprod.device.type == "meta", "diffusers no longer moves its table: drop the note about it"


@BOTH
def test_add_noise_refuses_timesteps_with_diffusers_exception(fast: Any, original: Any) -> None:
    x = torch.zeros(1, 3)
    for scheduler in (fast(), original()):
        for bad in (torch.tensor([1000]), torch.tensor([3.0])):
            with pytest.raises(IndexError):
                scheduler.add_noise(x, x, bad)
    with pytest.raises(IndexError, match="-1"):
        fast().add_noise(x, x, torch.tensor([-1]))


@BOTH
def test_noising_is_differentiable_as_in_diffusers(fast: Any, original: Any) -> None:
    t = torch.tensor([3, 700])
    gradients = []
    for scheduler in (fast(), original()):
        x, eps = normal(2, 3, 4, seed=1).requires_grad_(), normal(2, 3, 4, seed=2).requires_grad_()
        (scheduler.add_noise(x, eps, t).square().sum() + scheduler.get_velocity(x, eps, t).square().sum()).backward()
        gradients.append((x.grad, eps.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)


@BOTH
def test_noising_is_differentiable_after_inference_mode(fast: Any, original: Any) -> None:
    scheduler = fast()
    x, t = normal(2, 3, seed=1), torch.tensor([3, 700])
    with torch.inference_mode():
        expected = scheduler.add_noise(x, x, t).clone()
    eps = x.clone().requires_grad_()
    actual = scheduler.add_noise(x, eps, t)
    actual.sum().backward()
    assert torch.equal(actual, expected)
    assert eps.grad is not None
