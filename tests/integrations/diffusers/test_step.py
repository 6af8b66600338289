"""One step of FastDDPMScheduler and FastDDIMScheduler against diffusers' own, over all pairs of their settings."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from fastddpm.integrations.diffusers import FastDDIMScheduler, FastDDPMScheduler
from fastddpm.tables.table import COLUMN
from tests.integrations.diffusers.cases import SHAPE, STEP_RTOL, assert_step_matches, normal
from tests.ops.pairs import all_pairs, case_id

B, C, H, W = SHAPE
CLIPPING: dict[str, dict[str, Any]] = {
    "clip1": {},
    "clip2": {"clip_sample_range": 2.0},
    "free": {"clip_sample": False},
    "dynamic": {"thresholding": True, "sample_max_value": 2.5},
    "dynamic.5": {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 0.5},
}
VARIANCES = ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"]
COMMON: dict[str, list[Any]] = {
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "clipping": list(CLIPPING),
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "steps_offset": [0, 1],
    "rescale_betas_zero_snr": [False, True],
    "steps": [1, 7, 50, 1000],
    "dtype": [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64],
}
DDPM_CASES = all_pairs(
    {
        "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "trained"],
        "variance_type": [*VARIANCES, "learned", "learned_range", "unknown"],
        **COMMON,
        "steps": [None, [999, 500, 499, 3, 0], *COMMON["steps"]],
    }
)
DDIM_CASES = all_pairs(
    {
        "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "trained"],
        "set_alpha_to_one": [True, False],
        "eta": [0.0, 0.3, 1.0],
        "use_clipped_model_output": [False, True, None],
        **COMMON,
    }
)


def build(scheduler_class: Any, case: dict[str, Any], **changes: Any) -> Any:
    config = {k: v for k, v in case.items() if k not in ("clipping", "steps", "dtype", "eta")} | CLIPPING[
        case["clipping"]
    ]
    config.pop("use_clipped_model_output", None)
    if config["beta_schedule"] == "trained":
        config |= {"beta_schedule": "linear", "trained_betas": torch.linspace(2e-4, 0.03, 1000).tolist()}
    scheduler = scheduler_class(**config | changes)
    steps = case["steps"]
    if isinstance(steps, list):
        scheduler.set_timesteps(timesteps=steps)
    elif steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


def visited(scheduler: Any) -> list[int]:
    """The first, second, two middle and the last two timesteps that both can step from."""
    listed = [t for t in scheduler.timesteps.tolist() if t < len(scheduler.alphas_cumprod)]
    n = len(listed)
    return [listed[i] for i in sorted({0, 1 % n, n // 2, n * 9 // 10, n - 2 if n > 1 else 0, n - 1})]


def inputs(case: dict[str, Any], t: int) -> tuple[Tensor, Tensor]:
    x = normal(*SHAPE, seed=t, dtype=case["dtype"])
    learned = str(case.get("variance_type")).startswith("learned")
    m = normal(B, 2 * C if learned else C, H, W, seed=t + 10_000, dtype=case["dtype"])
    if learned:
        # A network's variance half lies in [-1, 1], and "learned" is a variance.
        m[:, C:] = m[:, C:].tanh().abs() if case["variance_type"] == "learned" else m[:, C:].tanh()
    return x, m


def compare(ours: Any, theirs: Any, t: int, x: Tensor, m: Tensor, **options: Any) -> None:
    """Take one step with both from the same global generator; compare results and what they drew."""
    torch.manual_seed(t)
    actual = ours.step(m, t, x, **options)
    ours_left = torch.random.get_rng_state()
    torch.manual_seed(t)
    expected = theirs.step(m, t, x, **options)
    assert torch.equal(ours_left, torch.random.get_rng_state())
    assert actual.prev_sample.dtype == actual.pred_original_sample.dtype == x.dtype
    assert actual.prev_sample.shape == x.shape
    if x.dtype == torch.float64:
        assert torch.equal(actual.prev_sample, expected.prev_sample)
        assert torch.equal(actual.pred_original_sample, expected.pred_original_sample)
    elif x.dtype == torch.float32:
        assert_step_matches(actual, expected, a=x0_gain(ours, t), scale=float(max(x.abs().max(), m.abs().max())))
    else:
        expected = step_in_float32(theirs, t, x, m, **options)
        assert_rounded_once(actual.prev_sample, expected.prev_sample)
        assert_rounded_once(actual.pred_original_sample, expected.pred_original_sample)


def step_in_float32(theirs: Any, t: int, x: Tensor, m: Tensor, **options: Any) -> Any:
    """Let diffusers step in float32, with noise drawn in x's dtype: in half precision it rounds every operation."""
    torch.manual_seed(t)

    def draw(shape: torch.Size, **_: Any) -> Tensor:
        return torch.randn(shape, dtype=x.dtype).float()

    with mock.patch(f"{type(theirs).__module__}.randn_tensor", draw):
        return theirs.step(m.float(), t, x.float(), **options)


def assert_rounded_once(result: Tensor, reference: Tensor) -> None:
    """Half an ulp of the storage type, and what the float32 arithmetic may add."""
    half_ulp = torch.finfo(result.dtype).eps / 2
    slack = 4 * STEP_RTOL * float(reference.abs().max())
    error = (result.float() - reference).abs()
    assert bool((error <= half_ulp * reference.abs() + slack).all()), float(error.max())


def x0_gain(scheduler: Any, t: int) -> float:
    options = {"eta": 0.0, "use_clipped_model_output": False} if isinstance(scheduler, DDIMScheduler) else {}
    return float(scheduler.table("step", torch.device("cpu"), **options)[t, COLUMN["a"]])


def is_undefined(case: dict[str, Any], scheduler: Any, t: int) -> bool:
    """Where diffusers returns infinities or NaN: x_0 from epsilon at alpha_bar = 0, and not clipped."""
    undefined = case["prediction_type"] == "epsilon" and float(scheduler.alphas_cumprod[t]) == 0.0
    return undefined and case["clipping"] in ("free", "dynamic", "dynamic.5")


@pytest.mark.parametrize("case", DDPM_CASES, ids=case_id)
def test_ddpm_step_matches_diffusers(case: dict[str, Any]) -> None:
    ours = build(FastDDPMScheduler, case)
    # diffusers' fixed_large_log is NaN.
    changes = {"variance_type": "fixed_large"} if case["variance_type"] == "fixed_large_log" else {}
    theirs = build(DDPMScheduler, case, **changes)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    for t in visited(theirs):
        if not is_undefined(case, theirs, t):
            compare(ours, theirs, t, *inputs(case, t))


@pytest.mark.parametrize("case", DDIM_CASES, ids=case_id)
def test_ddim_step_matches_diffusers(case: dict[str, Any]) -> None:
    ours, theirs = build(FastDDIMScheduler, case), build(DDIMScheduler, case)
    options = {"eta": case["eta"], "use_clipped_model_output": case["use_clipped_model_output"]}
    assert torch.equal(ours.timesteps, theirs.timesteps)
    for t in visited(theirs):
        x, m = inputs(case, t)
        if is_undefined(case, theirs, t):
            continue
        if case["eta"] == 1.0 and bool(theirs.step(m, t, x, **options).prev_sample.isnan().all()):
            # diffusers takes the root of 1 - alpha_bar_prev - sigma^2, which is 0 and has been rounded below it.
            assert bool(ours.step(m, t, x, **options).prev_sample.isfinite().all())
            continue
        compare(ours, theirs, t, x, m, **options)


def test_all_pairs_covers_every_pair() -> None:
    factors = {"p": [0, 1, 2], "q": [0, 1], "r": [0, 1, 2, 3]}
    cases = all_pairs(factors)
    assert {(c["p"], c["r"]) for c in cases} == {(p, r) for p in range(3) for r in range(4)}
    assert {(c["p"], c["q"]) for c in cases} == {(p, q) for p in range(3) for q in range(2)}
    assert {(c["q"], c["r"]) for c in cases} == {(q, r) for q in range(2) for r in range(4)}
