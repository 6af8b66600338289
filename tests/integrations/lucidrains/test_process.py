"""Buffers, steps and losses of the denoising-diffusion-pytorch drop-in, against the installed package."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fastddpm.integrations.lucidrains import GaussianDiffusion
from fastddpm.integrations.lucidrains.tables import OBJECTIVES, SCHEDULES
from tests.integrations.lucidrains.cases import (
    DTYPES,
    Cast,
    Net,
    assert_same,
    both,
    images,
    options,
    pair,
    seeded,
)
from tests.ops.pairs import all_pairs, case_id

pytestmark = pytest.mark.filterwarnings("ignore:the schedule does not end near a Gaussian")


@pytest.mark.parametrize(
    ("schedule", "kwargs"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("cosine", {"s": 0.02}),
        ("sigmoid", {}),
        ("sigmoid", {"start": 0, "end": 3, "tau": 0.7}),
    ],
)
@pytest.mark.parametrize("timesteps", [21, 1000, 1, 2])
def test_state_dict_is_the_originals_bit_for_bit(
    original: Any, schedule: str, kwargs: dict[str, Any], timesteps: int
) -> None:
    if schedule == "linear" and timesteps <= 20:
        # The original computes NaN there.
        with pytest.raises(ValueError, match="beta"):
            GaussianDiffusion(Net(), **options(timesteps=timesteps, beta_schedule=schedule))
        return
    # The cap matters to loss_weight alone, which both make in one expression.
    for objective, gamma in [
        *((objective, None) for objective in OBJECTIVES),
        *zip(OBJECTIVES, (5, 2.5, 5), strict=True),
    ]:
        theirs, ours = pair(
            original,
            timesteps=timesteps,
            beta_schedule=schedule,
            schedule_fn_kwargs=kwargs,
            objective=objective,
            min_snr_loss_weight=gamma is not None,
            min_snr_gamma=gamma or 5,
        )
        expected, actual = theirs.state_dict(), ours.state_dict()
        assert list(actual) == list(expected)
        for name in expected:
            assert actual[name].dtype == expected[name].dtype
            assert torch.equal(actual[name], expected[name]), (objective, gamma, name)


def test_attributes_are_the_originals(original: Any) -> None:
    theirs, ours = pair(original, sampling_timesteps=10, ddim_sampling_eta=0.5, offset_noise_strength=0.1)
    names = [name for name in vars(theirs) if not name.startswith("_") and name not in ("normalize", "unnormalize")]
    assert len(names) >= 9
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert torch.equal(ours.normalize(images()), theirs.normalize(images()))
    assert torch.equal(ours.unnormalize(images()), theirs.unnormalize(images()))
    assert ours.device == theirs.device


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_predictions_and_posteriors_are_the_originals_bits(original: Any, objective: str, schedule: str) -> None:
    theirs, ours = pair(original, objective=objective, beta_schedule=schedule)
    x, noise, x0 = (images(seed) * 2 - 1 for seed in (1, 2, 3))
    t = torch.tensor([0, 1, 30, 49])
    calls = {
        "predict_start_from_noise": (x, t, noise),
        "predict_noise_from_start": (x, t, x0),
        "predict_v": (x0, t, noise),
        "predict_start_from_v": (x, t, noise),
        "q_posterior": (x0, x, t),
        "p_mean_variance": (x, t),
        "model_predictions": (x, t),
        "q_sample": (x0, t, noise),
    }
    for name, arguments in calls.items():
        assert_same(getattr(ours, name)(*arguments), getattr(theirs, name)(*arguments), name)
    for clip, again in itertools.product((False, True), repeat=2):
        flags = {"clip_x_start": clip, "rederive_pred_noise": again}
        assert_same(ours.model_predictions(x, t, **flags), theirs.model_predictions(x, t, **flags), flags)
    assert_same(ours.p_mean_variance(x, t, clip_denoised=False), theirs.p_mean_variance(x, t, clip_denoised=False), 0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_p_sample_is_the_originals_bits_and_draws(original: Any, objective: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(original, objective=objective)
    theirs.model.to(dtype)
    x = (images(4) * 4 - 2).to(dtype)
    for t in (49, 1, 0):
        (expected, expected_state), (actual, state) = (seeded(each.p_sample, x, t) for each in (theirs, ours))
        assert_same(actual, expected, t)
        assert torch.equal(state, expected_state)


PROCESSES = {
    "objective": list(OBJECTIVES),
    "beta_schedule": list(SCHEDULES),
    "timesteps": [21, 50, 1000],
    "auto_normalize": [True, False],
    "offset_noise_strength": [0.0, 0.1],
    "min_snr_loss_weight": [False, True],
    "min_snr_gamma": [5, 2.5],
}


@pytest.mark.parametrize(
    "case",
    all_pairs({**PROCESSES, "at": [0, 1, 0.5, -2, -1], "x": DTYPES, "network": [*DTYPES, torch.bfloat16]}),
    ids=case_id,
)
def test_one_step_is_the_originals_over_all_pairs_of_settings(original: Any, case: dict[str, Any]) -> None:
    at, x_dtype, network_dtype = (case[name] for name in ("at", "x", "network"))
    settings = {name: case[name] for name in PROCESSES}
    T = settings["timesteps"]
    t = T // 2 if at == 0.5 else at % T
    net = Cast(network_dtype).eval()
    x = (images(4) * 4 - 2).to(x_dtype)
    theirs, ours = (kind(net, **options(**settings)) for kind in (original.GaussianDiffusion, GaussianDiffusion))
    (_, expected_x0), (_, x0) = (seeded(each.p_sample, x, t)[0] for each in (theirs, ours))
    both(ours, theirs, "p_sample", x, t, within=1e-6)
    a = float(ours.sqrt_recip_alphas_cumprod[t])
    bound = 4 * torch.finfo(torch.float32).eps * max(1.0, a) * float(x.abs().max())
    assert float((x0 - expected_x0).abs().max()) <= bound


@pytest.mark.parametrize(
    "case", all_pairs({**PROCESSES, "loss_reduction": ["mean", "none"], "noise": [None, 3]}), ids=case_id
)
def test_loss_is_the_originals_over_all_pairs_of_settings(original: Any, case: dict[str, Any]) -> None:
    theirs, ours = pair(original, **{name: case[name] for name in PROCESSES})
    t = torch.tensor([0, 1, case["timesteps"] // 2, case["timesteps"] - 1])
    noise = None if case["noise"] is None else images(case["noise"]) * 2 - 1
    with torch.no_grad():
        x_0, reduction = images(6) * 2 - 1, case["loss_reduction"]
        both(ours, theirs, "p_losses", x_0, t, noise, loss_reduction=reduction, within=1e-6)


def test_p_sample_of_channels_last_draws_in_memory_order(original: Any) -> None:
    x = images(4) * 4 - 2
    theirs, ours = pair(original)
    drawn = both(ours, theirs, "p_sample", x.to(memory_format=torch.channels_last), 20, within=0.0)
    assert not torch.equal(drawn, seeded(ours.p_sample, x, 20)[0][0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_p_sample_of_a_bfloat16_network_is_the_originals_bits(original: Any, objective: str) -> None:
    low, arguments = Cast(torch.bfloat16), options(objective=objective)
    kinds, x = (original.GaussianDiffusion, GaussianDiffusion), images(4) * 4 - 2
    ((expected, expected_x0), _), ((prev, x0), _) = (seeded(kind(low, **arguments).p_sample, x, 20) for kind in kinds)
    assert torch.equal(prev, expected)
    assert torch.equal(x0, expected_x0.float())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_training_loss_and_gradients_are_the_originals_bits(original: Any, objective: str, reduction: str) -> None:
    theirs, ours = pair(original, objective=objective, min_snr_loss_weight=True, offset_noise_strength=0.1)
    results = []
    for diffusion in (theirs, ours):
        torch.manual_seed(2)
        diffusion.model.zero_grad()
        loss = diffusion(images(6), loss_reduction=reduction)
        loss.sum().backward()
        results.append((loss.detach(), diffusion.model.weight.grad.clone(), torch.get_rng_state()))
    assert_same(results[1], results[0], objective)
