"""Whole loops of every solver that diffusers has against its scheduler, on the same network and noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastddpm.ops import twins
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.deis import deis_table
from fastddpm.tables.dpm_solver import dpm_solver_table
from fastddpm.tables.euler import euler_ancestral_table, euler_table, heun_table
from fastddpm.tables.sa_solver import sa_solver_table
from fastddpm.tables.table import Table
from fastddpm.tables.unipc import unipc_table
from tests.tables.float64 import execute_table64, relative_error

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
SCHEDULE = Schedule.linear()

# Each: their class, its config, our builder and its options. SDE forms of the third order are left out: diffusers 0.42
# weighs the second difference by ((1 - e^-2h - 2h) / (2h)^2 - 1/2), which is -1 as h vanishes; see k-diffusion's form.
CASES: dict[str, tuple[str, dict[str, Any], Callable[..., Table], dict[str, Any]]] = {
    **{
        f"dpm++{order}m-{kind}-{final}": (
            "DPMSolverMultistepScheduler",
            {"solver_order": order, "solver_type": kind, "final_sigmas_type": final},
            dpm_solver_table,
            {"order": order, "solver_type": kind},
        )
        for order, kind, final in ((2, "midpoint", "zero"), (2, "heun", "sigma_min"), (3, "midpoint", "zero"))
    },
    **{
        f"dpm++{order}m-sde-{kind}": (
            "DPMSolverMultistepScheduler",
            {"solver_order": order, "solver_type": kind, "algorithm_type": "sde-dpmsolver++"},
            dpm_solver_table,
            {"order": order, "solver_type": kind, "tau": 1.0},
        )
        for order, kind in ((1, "midpoint"), (2, "midpoint"), (2, "heun"))
    },
    # With the default final_sigmas_type diffusers 0.42 returns NaN for bh1: h is infinite in its B(h).
    **{
        f"unipc{order}-{variant}-{final}": (
            "UniPCMultistepScheduler",
            {"solver_order": order, "solver_type": variant, "final_sigmas_type": final},
            unipc_table,
            {"order": order, "variant": variant},
        )
        for order, variant, final in ((2, "bh2", "zero"), (3, "bh2", "zero"), (2, "bh1", "sigma_min"))
    },
    **{
        f"deis{order}": ("DEISMultistepScheduler", {"solver_order": order}, deis_table, {"order": order})
        for order in (1, 2, 3)
    },
    **{
        f"sa-{p}-{c}": (
            "SASolverScheduler",
            {"predictor_order": p, "corrector_order": c, "tau_func": lambda t: 0.7},
            sa_solver_table,
            {"order": p, "corrector_order": c, "tau": 0.7},
        )
        for p, c in ((2, 2), (3, 4), (1, 1))
    },
    "euler": ("EulerDiscreteScheduler", {}, euler_table, {}),
    "euler-karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, euler_table, {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}, euler_ancestral_table, {}),
    "heun": ("HeunDiscreteScheduler", {}, heun_table, {}),
    "heun-karras": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}, heun_table, {}),
}
# diffusers computes these coefficients in float32 as differences of large terms: with 50 steps its float32 loop is up
# to 2e-4 from its own float64 loop, which ours is compared with.
CANCELLING = ("deis3", "sa-3-4")


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network of v: nonlinear, and dependent on neighbours and on t."""
    m = torch.tanh(1.3 * x + 0.4 * x.roll(1, dims=-1)) * 0.8
    return m + (t.double().reshape(-1, 1) / 2000 - 0.2).to(x.dtype)


def noise(steps: int, dtype: torch.dtype) -> torch.Tensor:
    """The noise that diffusers draws from a generator of seed i in step i."""
    return torch.stack(
        [torch.randn(4, 8, dtype=dtype, generator=torch.Generator().manual_seed(i)) for i in range(steps)]
    )


def their_loop(scheduler: Any, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Run diffusers' loop; x has the variance of alpha x_0 + sigma eps."""
    name = type(scheduler).__name__
    of_sigma = name.startswith(("Euler", "Heun"))
    if of_sigma:
        x = x * (1 + scheduler.sigmas[0] ** 2).sqrt()
    for i, t in enumerate(scheduler.timesteps):
        m = model(scheduler.scale_model_input(x, t), t.expand(4))
        options: dict[str, Any] = {}
        if name.startswith("DPM") and "sde" in scheduler.config.algorithm_type:
            options["variance_noise"] = z[i]
        if name.startswith(("SA", "EulerAncestral")):
            options["generator"] = torch.Generator().manual_seed(i)
        x = scheduler.step(m, t, x, **options).prev_sample
    return x


def our_loop(table: Table, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Run the rows in float32 by the twin of the kernel."""
    flags = twins.Flags(clip=table.clip, history=table.history)
    ring = torch.zeros(table.history, *x.shape) if table.history else None
    for r, t in enumerate(table.timesteps):
        m = model(x, t.expand(4))
        x, *_ = twins.p_sample(x, m, table.rows, torch.tensor([r]), z[r % len(z)], flags, ring)
    return x


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("name", CASES)
def test_a_solver_samples_as_diffusers(name, steps):
    theirs, config, build, options = CASES[name]
    spacing = {} if "karras" in name else {"timestep_spacing": "trailing"}
    scheduler = getattr(diffusers, theirs)(
        beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction", **spacing, **config
    )
    scheduler.set_timesteps(steps)
    sigmas, timesteps = scheduler.sigmas.double(), scheduler.timesteps
    if build is heun_table:
        sigmas, timesteps = torch.cat([sigmas[:1], sigmas[1::2]]), torch.cat([timesteps[:1], timesteps[1::2]])
    if build is deis_table:
        options = options | {"lower_order_final": steps < 15}
    table = build(SCHEDULE, sigmas=sigmas, timesteps=timesteps, prediction_type="v", clip_range=None, **options)
    x_T = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    z = noise(steps, torch.float32)
    if name not in CANCELLING:
        assert relative_error(our_loop(table, x_T, z), their_loop(scheduler, x_T, z)) <= 1e-5

    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    stochastic = bool((table.column("sigma") > 0).any())
    # diffusers draws with torch.randn in the dtype of the state, which is other noise in float64.
    z64 = z.double() if theirs.startswith("DPM") else noise(steps, torch.float64)
    expected = their_loop(scheduler, x_T.double(), z64)
    double = execute_table64(table, model, x_T.double(), z64 if stochastic else None)
    # DPM-Solver and Euler round the state to float32 in their steps.
    assert relative_error(double, expected) <= (3e-6 if theirs.startswith(("DPM", "Euler")) else 1e-11)
    assert relative_error(our_loop(table, x_T, z64.float()), expected) <= 1e-5
