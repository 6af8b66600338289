"""The multistep solvers and the Euler schedulers against diffusers' own: whole loops, draws, files and quirks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import fastddpm
from fastddpm.integrations.diffusers import (
    FastDPMSolverMultistepScheduler,
    FastEulerAncestralDiscreteScheduler,
    FastEulerDiscreteScheduler,
    FastUniPCMultistepScheduler,
)
from tests.integrations.diffusers.cases import SHAPE, normal

ATOL = 1e-5
ALL: list[Any] = [
    FastDPMSolverMultistepScheduler,
    FastUniPCMultistepScheduler,
    FastEulerDiscreteScheduler,
    FastEulerAncestralDiscreteScheduler,
]
EACH = pytest.mark.parametrize("fast", ALL, ids=["dpm", "unipc", "euler", "ancestral"])
TO_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
DPM_CASES: list[dict[str, Any]] = [
    {},
    {"solver_order": 1, "timestep_spacing": "trailing"},
    {"solver_order": 3, "use_karras_sigmas": True, "prediction_type": "v_prediction"},
    {"solver_order": 3, "solver_type": "heun", "timestep_spacing": "leading", "steps_offset": 1},
    {"solver_type": "heun", "euler_at_final": True, "prediction_type": "sample"},
    {"use_lu_lambdas": True, "lower_order_final": False, **TO_SIGMA_MIN},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    {"use_exponential_sigmas": True, "solver_order": 3},
    {"algorithm_type": "sde-dpmsolver++"},
    {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "prediction_type": "v_prediction"},
    {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "use_karras_sigmas": True},
    {"algorithm_type": "dpmsolver", "solver_order": 3, **TO_SIGMA_MIN},
    {"algorithm_type": "sde-dpmsolver", **TO_SIGMA_MIN},
    {"thresholding": True, "sample_max_value": 2.0},
]
UNIPC_CASES: list[dict[str, Any]] = [
    {},
    {"solver_order": 1},
    {"solver_order": 3, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    {"solver_order": 3, "solver_type": "bh1", "lower_order_final": False, **TO_SIGMA_MIN},
    {"solver_type": "bh1", "use_karras_sigmas": True, "prediction_type": "sample", **TO_SIGMA_MIN},
    {"disable_corrector": [0, 3], "solver_order": 3},
    {"predict_x0": False, **TO_SIGMA_MIN},
    {"thresholding": True, "sample_max_value": 2.0},
]
EULER_CASES: list[dict[str, Any]] = [
    {},
    {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
]
CASES = [
    *((FastDPMSolverMultistepScheduler, case) for case in DPM_CASES),
    *((FastUniPCMultistepScheduler, case) for case in UNIPC_CASES),
    *((FastEulerAncestralDiscreteScheduler, case) for case in EULER_CASES),
    *((FastEulerDiscreteScheduler, case) for case in EULER_CASES),
    (FastEulerDiscreteScheduler, {"use_karras_sigmas": True}),
    (FastEulerDiscreteScheduler, {"prediction_type": "sample", **TO_SIGMA_MIN}),
]


def predict(scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
    """Be a network: nearly the exact one for data of deviation 0.5, whatever it is to predict."""
    steps = np.arange(len(scheduler.alphas_cumprod))
    alpha_bar = float(np.interp(float(t), steps, scheduler.alphas_cumprod.numpy()))
    alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    x = x.float()
    x_0 = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * x + 0.1 * torch.sin(3 * x + float(t) / 100).roll(1, -1)
    eps = (x - alpha * x_0) / max(sigma, 1e-3)
    kind = scheduler.config.prediction_type
    return x_0 if kind == "sample" else eps if kind == "epsilon" else alpha * eps - sigma * x_0


def run(
    scheduler: Any,
    steps: int,
    *,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    edit: Callable[[int, Tensor], Tensor] | None = None,
    between: Callable[[Any, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample as diffusers' pipelines do; return the images and what the generator would draw next."""
    generator = torch.Generator().manual_seed(1)
    scheduler.set_timesteps(steps)
    if start:
        scheduler.set_begin_index(start)
    options = {} if isinstance(scheduler, FastUniPCMultistepScheduler._original) else {"generator": generator}
    x = torch.randn(SHAPE, generator=generator).to(dtype) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps[start:]):
        m = predict(scheduler, scheduler.scale_model_input(x, t), t).to(dtype)
        x = scheduler.step(m, t, x, **options).prev_sample
        x = x if edit is None else edit(i, x)
        if between is not None:
            between(scheduler, i)
    return x, torch.randn(4, generator=generator)


def assert_same_run(ours: Any, theirs: Any, steps: int = 10, atol: float = ATOL, **options: Any) -> None:
    (x, left), (expected, expected_left) = (run(scheduler, steps, **options) for scheduler in (ours, theirs))
    assert x.dtype == expected.dtype
    torch.testing.assert_close(x, expected, rtol=0, atol=atol)
    assert torch.equal(left, expected_left)


@pytest.mark.parametrize(("fast", "config"), CASES, ids=lambda v: v._original.__name__ if isinstance(v, type) else None)
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_loops_are_diffusers_with_the_same_draws(fast: Any, config: dict[str, Any], steps: int) -> None:
    assert_same_run(fast(**config), fast._original(**config), steps)


@EACH
@pytest.mark.parametrize("start", [3, 9])
def test_a_run_may_begin_in_the_middle(fast: Any, start: int) -> None:
    assert_same_run(fast(), fast._original(), start=start)


@EACH
def test_states_edited_between_steps_count_as_in_diffusers(fast: Any) -> None:
    mask, known = normal(*SHAPE, seed=4) > 0, normal(*SHAPE, seed=5)
    # UniPC's corrector starts from its own state, whatever became of the one that it returned.
    assert_same_run(fast(), fast._original(), edit=lambda i, x: torch.where(mask, known, x))
    assert_same_run(fast(), fast._original(), edit=lambda i, x: x.mul_(0.9))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "prediction_type": lambda s: setattr(s.config, "prediction_type", "v_prediction"),
    "solver_type": lambda s: setattr(s.config, "solver_type", "heun" if "Solver" in type(s).__name__ else "bh1"),
    "sigmas in place": lambda s: s.sigmas[:-1].mul_(0.9),
    "lower_order_nums": lambda s: setattr(s, "lower_order_nums", 1),
}


@EACH
@pytest.mark.parametrize("change", CHANGES)
def test_steps_follow_what_is_written_into_scheduler_and_config(fast: Any, change: str) -> None:
    config = {} if "Euler" in fast.__name__ else {"solver_order": 3, **TO_SIGMA_MIN}

    def between(scheduler: Any, i: int) -> None:
        if i == 4:
            CHANGES[change](scheduler)

    assert_same_run(fast(**config), fast._original(**config), between=between)


@EACH
def test_loops_of_equal_settings_make_their_rows_once(fast: Any) -> None:
    scheduler = fast()
    for _ in range(2):
        # UniPC leaves an order behind, with which the second run begins.
        expected, _ = run(scheduler, 10)
    with mock.patch.object(fast._original, "step", side_effect=AssertionError):
        x, _ = run(scheduler, 10)
    assert torch.equal(x, expected)


@EACH
def test_float64_and_gradients_take_diffusers_own_step(fast: Any) -> None:
    results = []
    for scheduler in (fast(), fast._original()):
        x, _ = run(scheduler, 5, dtype=torch.float64)
        scheduler.set_timesteps(5)
        m = normal(*SHAPE, seed=1).requires_grad_()
        t = scheduler.timesteps[0]
        scheduler.step(m, t, scheduler.scale_model_input(normal(*SHAPE, seed=2), t)).prev_sample.sum().backward()
        results.append((x, m.grad))
    for ours, theirs in zip(*results, strict=True):
        if fast is FastEulerAncestralDiscreteScheduler and ours.dtype == torch.float32:
            continue
        assert torch.equal(ours, theirs)


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_steps_round_once(fast: Any, dtype: torch.dtype) -> None:
    ours, theirs = fast(), fast._original()
    half = torch.finfo(dtype).eps / 2
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    x = normal(*SHAPE, seed=1).to(dtype)
    for t in ours.timesteps[:4]:
        m = normal(*SHAPE, seed=int(t)).to(dtype)
        torch.manual_seed(1)
        actual = ours.step(m, t, x).prev_sample
        with mock.patch(f"{type(theirs).__module__}.randn_tensor", create=True) as draw:
            draw.side_effect = lambda shape, **_: torch.randn(shape, dtype=dtype).float()
            torch.manual_seed(1)
            expected = theirs.step(m.float(), t, x.float()).prev_sample
        assert actual.dtype == dtype
        # The older x_0 are kept in half precision as well.
        slack = 4 * half * float(expected.abs().max())
        assert float((actual.float() - expected).abs().max()) <= half * float(expected.abs().max()) + slack
        x = actual


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@EACH
def test_files_configs_and_copies_are_those_of_the_original(fast: Any, tmp_path: Path) -> None:
    config = {"beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
    theirs = fast._original(**config)
    ours = fast.from_config(theirs.config)
    assert isinstance(ours, fast._original)
    assert set(ours.compatibles) == set(theirs.compatibles)
    fast(**config).save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    expected, _ = run(theirs, 5)
    for other in (ours, fast.from_pretrained(tmp_path / "theirs"), copy.deepcopy(ours), fastddpm.accelerate(theirs)):
        assert type(other) is fast
        torch.testing.assert_close(run(other, 5)[0], expected, rtol=0, atol=ATOL)
        torch.testing.assert_close(run(pickle.loads(pickle.dumps(other)), 5)[0], expected, rtol=0, atol=ATOL)


def test_custom_timesteps_are_taken() -> None:
    timesteps = [999, 700, 450, 200, 40]
    results = []
    for scheduler in (FastDPMSolverMultistepScheduler(), FastDPMSolverMultistepScheduler._original()):
        scheduler.set_timesteps(timesteps=timesteps)
        x = normal(*SHAPE, seed=1)
        for t in scheduler.timesteps:
            x = scheduler.step(predict(scheduler, x, t), t, x).prev_sample
        results.append(x)
    torch.testing.assert_close(*results, rtol=0, atol=ATOL)


@EACH
def test_bad_input_raises_what_diffusers_raises(fast: Any) -> None:
    x = normal(*SHAPE, seed=1)
    for scheduler in (fast(), fast._original()):
        euler = "Euler" in type(scheduler).__name__
        if euler:
            scheduler.set_timesteps(5)
        with pytest.raises(ValueError, match="integer indices" if euler else "set_timesteps"):
            scheduler.step(x, 1, x)
    with pytest.raises(ValueError, match="num_inference_steps must be an integer >= 1, got 0"):
        fast().set_timesteps(0)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_bh1_reaches_the_last_sigma(order: int) -> None:
    config = {"solver_type": "bh1", "solver_order": order}
    theirs = FastUniPCMultistepScheduler._original(**config)
    assert bool(run(theirs, 10)[0].isnan().any()), "diffusers repaired bh1: compare with it from now on"

    def between(scheduler: Any, i: int) -> None:
        # The last step is of order 1, where the two are the same method.
        scheduler.config.solver_type = "bh2" if i == 8 else "bh1"

    expected, _ = run(theirs, 10, between=between)
    torch.testing.assert_close(run(FastUniPCMultistepScheduler(**config), 10)[0], expected, rtol=0, atol=ATOL)


def test_euler_with_churn_is_diffusers() -> None:
    results = []
    for scheduler in (FastEulerDiscreteScheduler(), FastEulerDiscreteScheduler._original()):
        scheduler.set_timesteps(5)
        t, x = scheduler.timesteps[0], normal(*SHAPE, seed=2)
        m = scheduler.scale_model_input(normal(*SHAPE, seed=1), t)
        generator = torch.Generator().manual_seed(1)
        results.append(scheduler.step(m, t, x, s_churn=1.0, generator=generator).prev_sample)
    assert torch.equal(*results)


def test_learned_variances_are_left_out_as_in_diffusers() -> None:
    results = []
    for scheduler in (FastDPMSolverMultistepScheduler, FastDPMSolverMultistepScheduler._original):
        solver = scheduler(variance_type="learned_range")
        solver.set_timesteps(5)
        x = normal(*SHAPE, seed=1)
        for t in solver.timesteps:
            m = torch.cat([predict(solver, x, t), normal(*SHAPE, seed=int(t))], dim=1)
            x = solver.step(m, t, x).prev_sample
        results.append(x)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=ATOL)
