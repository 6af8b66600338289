"""Tables, enums and spacing of the drop-in for OpenAI's packages."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fastddpm.integrations.openai import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
    space_timesteps,
)
from tests.integrations.openai.cases import (
    Hand,
    Net,
    build,
    state,
)


def test_linear_tables_have_the_known_values() -> None:
    diffusion, _, _ = build(ModelMeanType.EPSILON, ModelVarType.FIXED_LARGE, steps=1000)
    for t, expected in ((0, 0.9999), (500, 0.077797), (999, 4.0358e-5)):
        assert diffusion.alphas_cumprod[t] == pytest.approx(expected, rel=2e-5)
    # Known: the log of beta_tilde at t = 1 stands in at t = 0, as its variance does for FIXED_LARGE.
    assert diffusion.posterior_log_variance_clipped[0] == pytest.approx(-9.8167, abs=1e-4)
    net, x = Net().eval(), state()
    out = diffusion.p_mean_variance(net, x, torch.tensor([0, 1, 2, 999]))
    expected = [math.exp(-9.8167), *(float(diffusion.betas[t]) for t in (1, 2, 999))]
    for i, variance in enumerate(expected):
        assert out["variance"][i].unique().tolist() == pytest.approx([variance], rel=1e-4)


# A linear schedule of fewer than 20 steps has betas above 1.
@pytest.mark.parametrize(("name", "steps"), [*itertools.product(["linear", "cosine"], [25, 1000, 4000]), ("cosine", 2)])
def test_tables_agree_with_bayes_rule(name: str, steps: int) -> None:
    betas = get_named_beta_schedule(name, steps)
    hand = Hand(betas, ModelMeanType.EPSILON, ModelVarType.FIXED_SMALL)
    diffusion = GaussianDiffusion(
        betas=betas,
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
    )
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for i in {0, 1, steps // 2, steps - 1}:
        assert diffusion.posterior_mean_coef1[i] == pytest.approx(float(hand.posterior(one, zero, i)), rel=1e-9)
        assert diffusion.posterior_mean_coef2[i] == pytest.approx(float(hand.posterior(zero, one, i)), rel=1e-9)
        assert diffusion.posterior_log_variance_clipped[i] == pytest.approx(hand.log_variance(i, None), rel=1e-9)
        assert diffusion.alphas_cumprod_next[i] == pytest.approx([*hand.bar, 0.0][i + 2], rel=1e-12)
    for name in ("betas", "sqrt_recipm1_alphas_cumprod", "posterior_variance"):
        table = getattr(diffusion, name)
        assert isinstance(table, np.ndarray)
        assert table.dtype == np.float64
        assert table.shape == (steps,)


@pytest.mark.parametrize("steps", [25, 1000])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_tables_are_the_originals_to_the_last_bit(name: str, steps: int) -> None:
    # As improved-diffusion's GaussianDiffusion.__init__ writes them.
    betas = get_named_beta_schedule(name, steps)
    alphas = 1.0 - betas
    bar = np.cumprod(alphas, axis=0)
    prev = np.append(1.0, bar[:-1])
    variance = betas * (1.0 - prev) / (1.0 - bar)
    expected = {
        "betas": betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": prev,
        "alphas_cumprod_next": np.append(bar[1:], 0.0),
        "sqrt_alphas_cumprod": np.sqrt(bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - bar),
        "log_one_minus_alphas_cumprod": np.log(1.0 - bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / bar - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.append(variance[1], variance[1:])),
        "posterior_mean_coef1": betas * np.sqrt(prev) / (1.0 - bar),
        "posterior_mean_coef2": (1.0 - prev) * np.sqrt(alphas) / (1.0 - bar),
    }
    enums = (ModelMeanType.EPSILON, ModelVarType.FIXED_SMALL, LossType.MSE)
    kinds = dict(zip(("model_mean_type", "model_var_type", "loss_type"), enums, strict=True))
    diffusion = GaussianDiffusion(betas=betas, **kinds)  # type: ignore[arg-type]
    for table, values in expected.items():
        np.testing.assert_array_equal(getattr(diffusion, table), values, err_msg=table, strict=True)


@pytest.mark.parametrize(
    ("betas", "message"), [([0.5, 1.0, 0.5], r"betas\[1\] = 1.0"), ([0.5, 1e-17], "fall strictly")]
)
def test_betas_that_leave_no_process_are_refused(betas: list[float], message: str) -> None:
    enums = (ModelMeanType.EPSILON, ModelVarType.FIXED_SMALL, LossType.MSE)
    kinds = dict(zip(("model_mean_type", "model_var_type", "loss_type"), enums, strict=True))
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(betas=betas, **kinds)  # type: ignore[arg-type]


def test_space_timesteps_accumulates_for_every_count() -> None:
    for count in range(2, 1001):
        position, expected = 0.0, set()
        for _ in range(count):
            expected.add(round(position))
            position += 999 / (count - 1)
        assert space_timesteps(1000, [count]) == expected
    assert space_timesteps(1000, "1000") == expected


def test_space_timesteps_keeps_sections_and_strides() -> None:
    assert space_timesteps(1000, "ddim250") == set(range(0, 1000, 4))
    kept = space_timesteps(300, [10, 15, 20])
    assert [sum(start <= t < start + 100 for t in kept) for start in (0, 100, 200)] == [10, 15, 20]
    for counts in ("ddim299", [301], "ddimx"):
        with pytest.raises(ValueError):  # noqa: PT011
            space_timesteps(300, counts)


def test_enums_have_the_originals_members_and_values() -> None:
    assert [(m.name, m.value) for m in ModelMeanType] == [("PREVIOUS_X", 1), ("START_X", 2), ("EPSILON", 3)]
    names = ["LEARNED", "FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"]
    assert [(m.name, m.value) for m in ModelVarType] == list(zip(names, range(1, 5), strict=True))
    assert [(m.name, m.is_vb()) for m in LossType] == [
        ("MSE", False),
        ("RESCALED_MSE", False),
        ("KL", True),
        ("RESCALED_KL", True),
    ]
