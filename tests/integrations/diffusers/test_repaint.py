"""FastRePaintScheduler against diffusers', given its noise: whole walks with jumps, and single steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from fastddpm.integrations.diffusers import FastRePaintScheduler  # noqa: E402

IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
MASK = (torch.arange(8) < 4).float().expand(2, 1, 8, 8)


def network(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(0.9 * x + 0.1 * torch.roll(x, 1, dims=-1)) * (0.5 + float(t) / 2000)


def walk(scheduler: Any, mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """RePaintPipeline's loop."""
    g = torch.Generator().manual_seed(0)
    x, last = torch.randn(IMAGE.shape, generator=g, dtype=torch.float32).to(dtype), int(scheduler.timesteps[0]) + 1
    image, mask = IMAGE.to(dtype), mask.to(dtype)
    for t in scheduler.timesteps:
        if t < last:
            x = scheduler.step(network(x, t), t, x, image, mask, g).prev_sample
        else:
            x = scheduler.undo_step(x, last, g)
        last = t
    return x


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("options", [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"clip_sample": False}], ids=str)
@pytest.mark.parametrize("mask", [MASK, 0.25 + 0.5 * MASK], ids=["binary", "soft"])
def test_walks_agree_with_diffusers(eta: float, options: dict[str, Any], mask: Tensor) -> None:
    pair = [kind(eta=eta, **options) for kind in (diffusers.RePaintScheduler, FastRePaintScheduler)]
    for scheduler in pair:
        scheduler.set_timesteps(25, jump_length=5, jump_n_sample=2)
    expected, x = (walk(scheduler, mask) for scheduler in pair)
    assert (x - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


def test_float64_and_gradients_take_diffusers_step() -> None:
    pair = [kind(eta=1.0) for kind in (diffusers.RePaintScheduler, FastRePaintScheduler)]
    for scheduler in pair:
        scheduler.set_timesteps(5, jump_length=2, jump_n_sample=2)
    assert torch.equal(*(walk(scheduler, MASK, torch.float64) for scheduler in pair))
    x = torch.zeros_like(IMAGE, requires_grad=True)
    assert pair[1].step(network(x, 800), 800, x, IMAGE, MASK).prev_sample.requires_grad


def test_set_timesteps_refuses_no_steps() -> None:
    with pytest.raises(ValueError, match="integer >= 1, got 0"):
        FastRePaintScheduler().set_timesteps(0)


def test_files_name_the_original(tmp_path: Any) -> None:
    FastRePaintScheduler(eta=0.5).save_pretrained(tmp_path)
    assert diffusers.RePaintScheduler.from_pretrained(tmp_path).config.eta == 0.5
