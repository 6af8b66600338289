"""The importance samplers of timesteps, against their formulas by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastddpm.integrations.openai import LossSecondMomentResampler, UniformSampler, create_named_schedule_sampler
from fastddpm.integrations.openai.resample import LossAwareSampler
from tests.integrations.openai.cases import T, build


def test_uniform_sampler_draws_from_numpys_generator() -> None:
    sampler = create_named_schedule_sampler("uniform", build()[0])
    assert type(sampler) is UniformSampler
    np.random.seed(3)
    t, weights = sampler.sample(50, "cpu")
    np.random.seed(3)
    assert t.tolist() == np.random.choice(T, size=(50,), p=np.full(T, 1 / T)).tolist()
    assert t.dtype == torch.int64
    assert torch.equal(weights, torch.ones(50))


def test_second_moments_of_the_last_losses_decide_the_draws() -> None:
    sampler = create_named_schedule_sampler("loss-second-moment", build()[0])
    assert isinstance(sampler, LossAwareSampler)
    losses = torch.rand(12, T, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    for row in losses[:9]:
        sampler.update_with_local_losses(torch.arange(T), row)
    assert np.array_equal(sampler.weights(), np.ones(T))
    for row in losses[9:]:
        sampler.update_with_local_losses(torch.arange(T), row)
    moment = losses[2:].square().mean(dim=0).sqrt()
    p = 0.999 * moment / moment.sum() + 0.001 / T
    np.testing.assert_allclose(sampler.weights(), p.numpy(), rtol=1e-12)
    np.random.seed(0)
    t, weights = sampler.sample(20000, "cpu")
    torch.testing.assert_close(weights.double(), 1 / (T * p[t]), rtol=1e-6, atol=0)
    # The mean of any loss, weighted so, is that of uniform draws: within five standard errors.
    values = weights.double() * losses[11][t]
    assert abs(float(values.mean() - losses[11].mean())) <= 5 * float(values.std()) / 20000**0.5


def test_losses_of_all_ranks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = LossSecondMomentResampler(build()[0], history_per_term=2, uniform_prob=0.0)

    def gather(parts: list[object], mine: object) -> None:
        parts[:] = [mine, (list(range(T)), [3.0] * T)]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    sampler.update_with_local_losses(torch.arange(T), torch.arange(T).float())
    expected = np.sqrt((np.arange(T) ** 2 + 9) / 2)
    np.testing.assert_allclose(sampler.weights(), expected / expected.sum(), rtol=1e-12)


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="second-moment"):
        create_named_schedule_sampler("loss-second-momen", build()[0])
