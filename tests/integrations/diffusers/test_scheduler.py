"""What FastDDPMScheduler and FastDDIMScheduler promise beyond diffusers' numbers: noise, quirks, errors, layouts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from fastddpm.integrations.diffusers import FastDDIMScheduler, FastDDPMScheduler
from tests.integrations.diffusers.cases import (
    BOTH,
    SHAPE,
    STEP_RTOL,
    normal,
    x_and_m,
)


def run(scheduler: Any, generator: Any, **options: Any) -> torch.Tensor:
    """Sample with m = tanh(x + t / 500), drawing as diffusers' pipelines do."""
    x = normal(*SHAPE, seed=3)
    for t in scheduler.timesteps:
        m = torch.tanh(x + int(t) / 500)
        x = scheduler.step(m, t, x, generator=generator, **options).prev_sample
    return x


@pytest.mark.parametrize(
    ("fast", "original", "config", "options", "draws"),
    [
        (FastDDPMScheduler, DDPMScheduler, {}, {}, 9),
        (FastDDPMScheduler, DDPMScheduler, {"timestep_spacing": "trailing"}, {}, 10),
        (FastDDPMScheduler, DDPMScheduler, {"steps_offset": 1}, {}, 10),
        (FastDDIMScheduler, DDIMScheduler, {}, {"eta": 0.0}, 0),
        (FastDDIMScheduler, DDIMScheduler, {}, {"eta": 0.5}, 10),
    ],
    ids=["ddpm-leading", "ddpm-trailing", "ddpm-offset", "ddim", "ddim-eta"],
)
def test_step_draws_as_often_as_diffusers(fast: Any, original: Any, config: Any, options: Any, draws: int) -> None:
    ours, theirs = fast(**config), original(**config)
    counted = torch.Generator().manual_seed(4)
    for _ in range(draws):
        torch.randn(SHAPE, generator=counted)
    left = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        generator = torch.Generator().manual_seed(4)
        run(scheduler, generator, **options)
        left.append(generator.get_state())
    assert torch.equal(left[0], left[1])
    assert torch.equal(left[0], counted.get_state())


@BOTH
def test_step_takes_a_list_of_generators(fast: Any, original: Any) -> None:
    results = []
    for scheduler in (fast(), original()):
        scheduler.set_timesteps(10)
        options = {"eta": 1.0} if isinstance(scheduler, DDIMScheduler) else {}
        results.append(run(scheduler, [torch.Generator().manual_seed(s) for s in (6, 7)], **options))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


def test_ddim_step_takes_the_callers_noise() -> None:
    ours, theirs = FastDDIMScheduler(), DDIMScheduler()
    (x, m), z = x_and_m(), normal(*SHAPE, seed=8)
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        state = torch.random.get_rng_state()
        results.append(scheduler.step(m, 500, x, eta=0.7, variance_noise=z).prev_sample)
        assert torch.equal(state, torch.random.get_rng_state())
        with pytest.raises(ValueError, match="both"):
            scheduler.step(m, 500, x, eta=0.7, variance_noise=z, generator=torch.Generator())
    bound = STEP_RTOL * float(results[1].abs().max())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=bound)


def test_step_adds_noise_to_the_final_image_where_diffusers_does() -> None:
    config = {"timestep_spacing": "trailing", "variance_type": "fixed_large", "prediction_type": "sample"}
    ours = FastDDPMScheduler(**config)
    ours.set_timesteps(50)
    final = ours.timesteps[-1]
    assert int(final) == 19
    zero = torch.zeros(64, 1, 8, 8)
    image = ours.step(zero, final, zero, generator=torch.Generator().manual_seed(9)).prev_sample
    # Standard deviation 0.0762; 4096 draws, 5 standard errors.
    assert abs(float(image.std()) / 0.0762 - 1) < 5 / (2 * 4096) ** 0.5


def test_fixed_large_log_has_the_deviation_of_fixed_large() -> None:
    x, m = x_and_m()
    results = []
    for name in ("fixed_large_log", "fixed_large"):
        scheduler = FastDDPMScheduler(variance_type=name)
        results.append(
            [
                scheduler.step(m.to(dtype), 500, x.to(dtype), torch.Generator().manual_seed(1)).prev_sample
                for dtype in (torch.float32, torch.float64)
            ]
        )
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    theirs = DDPMScheduler(variance_type="fixed_large_log").step(m, 500, x).prev_sample
    assert bool(theirs.isnan().all()), "diffusers repaired fixed_large_log: compare with it from now on"


@pytest.mark.parametrize("clipping", [{}, {"thresholding": True}], ids=["clip", "dynamic"])
@BOTH
def test_zero_terminal_snr_with_epsilon_is_finite(fast: Any, original: Any, clipping: dict[str, Any]) -> None:
    ours, theirs = fast(rescale_betas_zero_snr=True, **clipping), original(rescale_betas_zero_snr=True, **clipping)
    x, m = x_and_m()
    m[0, 0, 0, 0] = x[0, 0, 0, 0]
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        scheduler.timesteps = torch.tensor([999, 899, 799])
    actual, expected = ours.step(m, 999, x), theirs.step(m, 999, x)
    assert bool(actual.prev_sample.isfinite().all())
    assert bool((actual.pred_original_sample.abs() <= 1).all())
    if not clipping:
        # 0 / 0 is NaN in diffusers.
        known = expected.pred_original_sample.isfinite()
        assert int((~known).sum()) == 1
        assert torch.equal(actual.pred_original_sample[known], expected.pred_original_sample[known])


@BOTH
def test_step_follows_attributes_that_are_assigned(fast: Any, original: Any) -> None:
    ours, theirs = fast(), original()
    x, m = x_and_m()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    ours.step(m, 500, x)
    for scheduler in (ours, theirs):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**0.5
        scheduler.timesteps = torch.tensor([700, 500, 200])
        scheduler.register_to_config(prediction_type="v_prediction", clip_sample=False)
    results = [scheduler.step(m, 500, x, generator=torch.Generator().manual_seed(1)) for scheduler in (ours, theirs)]
    torch.testing.assert_close(results[0].prev_sample, results[1].prev_sample, rtol=0, atol=3e-6)


CHANGES: dict[str, Any] = {
    "clip_sample": lambda s: setattr(s.config, "clip_sample", False),
    "clip_sample_range": lambda s: setattr(s.config, "clip_sample_range", 0.5),
    "prediction_type": lambda s: setattr(s.config, "prediction_type", "sample"),
    "thresholding": lambda s: vars(s.config).update(thresholding=True, sample_max_value=3.0),
    "config.variance_type": lambda s: setattr(s.config, "variance_type", "fixed_large"),
    "variance_type": lambda s: setattr(s, "variance_type", "fixed_small_log"),
    "num_train_timesteps": lambda s: setattr(s.config, "num_train_timesteps", 500),
    "alphas_cumprod in place": lambda s: s.alphas_cumprod.mul_(0.5),
    "timesteps in place": lambda s: s.timesteps[1:].sub_(3),
}


@pytest.mark.parametrize("change", CHANGES)
@BOTH
def test_step_follows_what_is_written_into_config_and_tensors(fast: Any, original: Any, change: str) -> None:
    x, m = x_and_m()
    results = []
    for scheduler in (fast(), original()):
        scheduler.set_timesteps(10)
        first = scheduler.step(m, 900, x, generator=torch.Generator().manual_seed(1)).prev_sample
        CHANGES[change](scheduler)
        changed = scheduler.step(m, 900, x, generator=torch.Generator().manual_seed(1)).prev_sample
        results.append((first, changed))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=STEP_RTOL * float(theirs.abs().max()))
    only_one_of_them_reads = ("timesteps in place", "variance_type", "config.variance_type", "num_train_timesteps")
    assert change in only_one_of_them_reads or not torch.equal(*results[1])


def test_variance_types_that_disagree_mean_what_they_do_in_diffusers() -> None:
    x = normal(*SHAPE, seed=1)
    m = normal(SHAPE[0], 2 * SHAPE[1], *SHAPE[2:], seed=2).tanh()
    for kind, own in itertools.product(["fixed_small", "fixed_large", "learned", "learned_range"], repeat=2):
        results: list[Any] = []
        for scheduler in (FastDDPMScheduler(variance_type=kind), DDPMScheduler(variance_type=kind)):
            scheduler.variance_type = own
            output = m if own.startswith("learned") else m[:, : SHAPE[1]]
            try:
                step = scheduler.step(output, 500, x, generator=torch.Generator().manual_seed(1))
                results.append(step.prev_sample)
            except TypeError:
                results.append(None)
        if results[1] is None:
            assert results[0] is None, (kind, own)
        else:
            torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5, equal_nan=True, msg=f"{kind}, {own}")


@pytest.mark.parametrize("shape", [(5, 2), (1, 3, 7, 5), (3, 1, 2, 3, 4)], ids=["points", "odd", "video"])
@BOTH
def test_step_takes_any_shape(fast: Any, original: Any, shape: tuple[int, ...]) -> None:
    x, m = x_and_m(*shape)
    results = []
    for scheduler in (fast(), original()):
        scheduler.set_timesteps(20)
        results.append(scheduler.step(m, 500, x, generator=torch.Generator().manual_seed(1)).prev_sample)
    bound = STEP_RTOL * float(results[1].abs().max())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=bound)


@BOTH
def test_step_reads_channels_last_and_expanded_tensors_alike(fast: Any, original: Any) -> None:
    scheduler = fast()
    scheduler.set_timesteps(20)
    x, m = normal(1, 3, 4, 4, seed=1).expand(*SHAPE), normal(*SHAPE, seed=2)

    def step(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return scheduler.step(m, 500, x, generator=torch.Generator().manual_seed(1)).prev_sample

    expected = step(x.contiguous(), m)
    assert torch.equal(step(x, m), expected)
    assert torch.equal(step(x, m.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(step(x.contiguous(memory_format=torch.channels_last), m), expected)


@BOTH
def test_step_promotes_the_dtypes_as_diffusers(fast: Any, original: Any) -> None:
    x, m = x_and_m()
    for dtypes in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)):
        results = []
        for scheduler in (fast(), original()):
            scheduler.set_timesteps(20)
            results.append(scheduler.step(m.to(dtypes[1]), 500, x.to(dtypes[0])).prev_sample.dtype)
        assert results[0] == results[1]


@BOTH
def test_step_is_differentiable_as_in_diffusers(fast: Any, original: Any) -> None:
    x, m = x_and_m()
    gradients = []
    for scheduler in (fast(), original()):
        scheduler.set_timesteps(20)
        output = m.clone().requires_grad_()
        scheduler.step(output, 500, x, generator=torch.Generator().manual_seed(1)).prev_sample.square().sum().backward()
        gradients.append(output.grad)
    assert torch.equal(gradients[0], gradients[1])
